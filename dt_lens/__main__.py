"""``python -m dt_lens``: the command line."""

from dt_lens.cli.app import main

if __name__ == "__main__":
    main()
