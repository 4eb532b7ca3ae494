"""``python -m dt_lens_benchmarks SUBJECT [--quick]``: the rows of one subject, a line of JSON each, as they come."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import redirect_stdout

from dt_lens_benchmarks.subjects import SUBJECTS


def main(words: list[str]) -> int:
    """Measure the subject that ``words`` names; returns the exit status."""
    names = [word for word in words if not word.startswith("-")]
    if len(names) != 1 or names[0] not in SUBJECTS or {*words} - {"--quick", names[0]}:
        print(f"usage: python -m dt_lens_benchmarks {{{','.join(SUBJECTS)}}} [--quick]", file=sys.stderr)
        return 2
    rows = sys.stdout
    with redirect_stdout(sys.stderr):  # what a library prints is no row
        for row in importlib.import_module(f"dt_lens_benchmarks.{names[0]}").measure("--quick" in words):
            print(json.dumps(row._asdict()), file=rows, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
