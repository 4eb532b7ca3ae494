"""TODO docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dt_lens.cli.options import Given, Model, Seed, load_model
from dt_lens.cli.output import print_table

if TYPE_CHECKING:
    pass


__all__ = [
    "certify",
]


def certify(model: Model, seed: Seed = 0, given: Given = None) -> None:
    """Prove by a forward pass that every matrix's name, orientation, scale and heads are right."""
    loaded = load_model(model, given, check=False)
    from dt_lens.lens.certification import certify as prove

    certificate = prove(loaded, seed)
    import pandas as pd

    print_table(
        pd.DataFrame({"matrix": certificate.errors.keys(), "relative error": certificate.errors.values()}),
        f"{model}: certified",
    )
    print(certificate)
