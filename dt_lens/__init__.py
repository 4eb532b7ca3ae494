"""dt-lens: what the weights of a decision transformer do, measured.

>>> import dt_lens
>>> dt_lens.__version__.count(".")
2
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dt_lens.errors import DtLensError
from dt_lens.version import __version__

if TYPE_CHECKING:
    from dt_lens.lens.activations import Activations
    from dt_lens.behaviour.collect_activations import collect_activations
    from dt_lens.behaviour.evaluate import evaluate
    from dt_lens.lens.certification import certify
    from dt_lens.decision_transformer.checkpoint import save_pretrained
    from dt_lens.decision_transformer.model import HookedDecisionTransformer
    from dt_lens.edits.singular import SingularEdit
    from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
    from dt_lens.lens.loading import load, open_checkpoint, wrap
    from dt_lens.svd.two_models.comparison import compare
    from dt_lens.svd.plots import plot_heatmap, plot_overview, plot_sigma_against_cosine, plot_spectrum
    from dt_lens.svd.weight_svd import WeightSVD

# Where each public name lives. They are imported when first used: torch and TransformerLens take seconds, and neither
# `dt-lens --help` nor a rollout worker has any use for all of them.
_HOMES = {
    "Activations": "activations",
    "Embedding": "embeddings",
    "EmbeddingRegistry": "embeddings",
    "HookedDecisionTransformer": "decision_transformer.model",
    "SingularEdit": "edits",
    "WeightSVD": "svd",
    "certify": "certification",
    "collect_activations": "behaviour.activations",
    "compare": "model_comparison",
    "evaluate": "behaviour.evaluate",
    "load": "lens",
    "open_checkpoint": "lens",
    "plot_heatmap": "report.plots",
    "plot_overview": "report.plots",
    "plot_sigma_against_cosine": "report.plots",
    "plot_spectrum": "report.plots",
    "save_pretrained": "decision_transformer.checkpoint",
    "wrap": "lens",
}

__all__ = [
    "Activations",
    "DtLensError",
    "Embedding",
    "EmbeddingRegistry",
    "HookedDecisionTransformer",
    "SingularEdit",
    "WeightSVD",
    "__version__",
    "certify",
    "collect_activations",
    "compare",
    "evaluate",
    "load",
    "open_checkpoint",
    "plot_heatmap",
    "plot_overview",
    "plot_sigma_against_cosine",
    "plot_spectrum",
    "save_pretrained",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"dt_lens.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
