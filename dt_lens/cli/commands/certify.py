"""The command `certify`: check by a forward pass that the weights are read correctly."""

from __future__ import annotations

from dt_lens.cli.options import Given, Json, Model, Seed, load_model
from dt_lens.cli.output import print_json, print_table, progress, say

EXAMPLES = (
    "dt-lens certify hopper",
    "dt-lens certify tiny-gpt2",
    "dt-lens certify model.pt -g n_heads=1",
)


def certify(model: Model, seed: Seed = 0, given: Given = None, as_json: Json = False) -> None:
    """Prove by a forward pass that the name, orientation, scale and heads of every matrix are right."""
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given, check=False)
        from dt_lens.lens.certification import certify as prove

        certificate = prove(loaded, seed, progress=tell)
    if as_json:
        print_json("certify", model=model, certificate=str(certificate), errors=certificate.errors)
        return
    import pandas as pd

    print_table(
        pd.DataFrame({"matrix": certificate.errors.keys(), "relative error": certificate.errors.values()}),
        f"{model}: certified",
    )
    say(certificate)
