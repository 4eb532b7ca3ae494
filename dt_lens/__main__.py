"""``python -m dt_lens``."""

from dt_lens.cli import main

if __name__ == "__main__":
    main()
