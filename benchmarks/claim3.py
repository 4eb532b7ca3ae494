"""Claim 3 of the court with directions as units, from a sweep of its twelve edits: part E of "What is computed again".

    dt-lens sweep hopper --matrices '*.W_in,*.W_out' --sv 0,2 --value constant --episodes 20 --out runs/claim3
    python benchmarks/claim3.py hopper runs/claim3

Episodes that every arm has finished are used.
"""

from __future__ import annotations

import sys

import numpy as np

import dt_lens
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.edits.singular import load_edit
from dt_lens.lens.matrices import find_matrix
from dt_lens.study.court.case import Case
from dt_lens.study.court.damage import _of_directions, output_shares
from dt_lens.study.court.rollouts import MeasuredEdit


def main(name: str, folder: str) -> None:
    """Print the difference of the means, Welch's interval and the exact one-sided permutation p, by three energies."""
    model = dt_lens.load(name)
    found = {arm: e for arm, e in SweepResults(folder).evaluations().items() if len(e)}
    seeds = set.intersection(*(set(e.seeds.tolist()) for e in found.values()))
    returns = {
        arm: np.array([r for s, r in zip(e.seeds, e.returns, strict=True) if s in seeds]) for arm, e in found.items()
    }
    edits = []
    for arm, evaluation in found.items():
        if arm:
            (record,) = evaluation.edits
            matrix = find_matrix(model, record["matrix"])
            energy = load_edit(model, record).energy
            sv, none = int(np.atleast_1d(record["sv"])[0]), np.zeros((0, len(seeds)))
            edits.append(MeasuredEdit(matrix.name, matrix.kind, "", sv, energy, record, returns[arm], none))
    print(f"{len(edits)} edits, {len(seeds)} episodes each, unedited {returns[0].mean():,.0f}")
    inputs, case = dt_lens.collect_activations(model, seed=0), Case(model, 0, 200)
    damage = np.array([(returns[0] - e.returns).mean() / returns[0].mean() for e in edits])
    inward = np.array([e.kind == "W_in" for e in edits])
    for edit, lost in zip(edits, damage, strict=True):
        print(f"  {edit.matrix} sv={edit.sv}: {lost:+.3f}, energy {edit.energy:.3g}")
    energies = {
        "Frobenius norm": [e.energy for e in edits],
        "output energy, a share": output_shares(case, edits, inputs),
        "absolute output energy": output_shares(case, edits, inputs, absolute=True),
    }
    for what, values in energies.items():
        size = np.asarray(values)
        per = damage / (size / np.exp(np.log(size).mean()))
        value, low, high, p = _of_directions(per[inward], per[~inward])
        print(f"{what}: {value:+.3f} [{low:+.3f}, {high:+.3f}], one-sided p = {p:.3g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
