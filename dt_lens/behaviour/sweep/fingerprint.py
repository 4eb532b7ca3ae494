"""Whether a model comes to the same bits elsewhere: versions of software, and a little of what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dt_lens.behaviour.job import Job
from dt_lens.version import __version__

__all__ = ["SAMPLE", "fingerprint"]

SAMPLE = "sample"  # the entry that a little of what the unedited model does decides


def fingerprint(job: Job) -> Mapping[str, Any]:
    """What must be equal on two machines before one may run blocks of the other's sweep."""
    return {"version of dt-lens": __version__, **job.provenance(), SAMPLE: job.sample()}
