"""The command `certify`: check by a forward pass that the weights are read correctly."""

from __future__ import annotations

from dt_lens.cli.options import Given, Model, Seed, load_model
from dt_lens.cli.output import print_table


def certify(model: Model, seed: Seed = 0, given: Given = None) -> None:
    """Prove by a forward pass that the name, orientation, scale and heads of every matrix are right."""
    loaded = load_model(model, given, check=False)
    from dt_lens.lens.certification import certify as prove

    certificate = prove(loaded, seed)
    import pandas as pd

    print_table(
        pd.DataFrame({"matrix": certificate.errors.keys(), "relative error": certificate.errors.values()}),
        f"{model}: certified",
    )
    print(certificate)
