"""Write a decision transformer so that Hugging Face reads it back to identical outputs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from dt_lens.arguments import local_path
from dt_lens.decision_transformer.hf_layout import config_to_hf, hf_from_canonical
from dt_lens.errors import DtLensError, because

if TYPE_CHECKING:
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = ["save_pretrained"]


def save_pretrained(model: HookedDecisionTransformer, folder: str | Path) -> Path:
    """Write ``config.json``, ``model.safetensors`` (Hugging Face's format) and ``dt_lens.json`` (the run facts).

    Each file is complete or not there: they are written into a scratch folder inside and renamed at the end.

    Raises:
        DtLensError: for a model that Hugging Face's class cannot represent, or a folder that cannot be written.
    """
    folder = local_path(folder, "folder")
    config = config_to_hf(model.cfg)
    tensors = hf_from_canonical(model.weights, model.cfg)
    config["dtype"] = str(tensors["encoder.wte.weight"].dtype).removeprefix("torch.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".dt-lens-") as scratch:
            written = Path(scratch)
            (written / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
            model.facts.save(written)
            for file in sorted(written.iterdir()):
                file.chmod(0o644)  # safetensors leaves it to its owner alone
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or because(error)
        raise DtLensError(
            f"The checkpoint cannot be written to {folder}: {reason}; choose another folder or make room."
        ) from error
    return folder
