"""What d3rlpy's configuration says, in dt-lens's words; a ``.d3`` file holds it, and ``params.json`` beside weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dt_lens.errors import DtLensError, because

__all__ = ["ACTIVATIONS", "DIVIDED", "said_by_settings", "settings_in"]

# d3rlpy's names of activations to dt-lens's; "none" is the identity.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "tanh": "tanh", "swish": "silu", "silu": "silu", "none": "none"}
# Options of a state encoder. Its layers are read off their tensors; dropout does nothing in evaluation mode.
DIVIDED = "pixels divided by 255"
ENCODER = {
    "activation", "dropout_rate", "exclude_last_activation", "feature_size", "filters", "hidden_units",
    "last_activation", "use_batch_norm", "use_dense", "use_layer_norm",
}  # fmt: skip


def settings_in(text: Any, file: Path) -> dict[str, Any]:
    """The configuration that a ``.d3`` file holds as a string of JSON; an empty one where it holds no string.

    Raises:
        DtLensError: for a string that is not JSON.
    """
    if not isinstance(text, str):
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DtLensError(f"The configuration in {file} cannot be read as JSON: {because(error)}.") from error
    return values if isinstance(values, dict) else {}


def said_by_settings(settings: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Options and run facts of the adapter, as far as the settings give them.

    Raises:
        DtLensError: for a scaling of actions or rewards that dt-lens cannot do, unless it is ``ignored`` by name, and
            for settings of another form.
    """
    try:
        return _said(settings, ignored) if settings else {}
    except DtLensError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DtLensError(
            f"d3rlpy's configuration of this model is not of the form that dt-lens knows ({type(error).__name__}: "
            f"{error}); give weights that save_model wrote, with n_heads= and act_fn=."
        ) from error


def _said(settings: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    params = settings["config"]["params"]
    said: dict[str, Any] = {
        "n_heads": params["num_heads"],
        "act_fn": params["activation_type"],
        "context": params["context_size"],
        "max_timestep": params["max_timestep"],
    }
    if "embed_activation_type" in params:
        said["embed_act"] = params["embed_activation_type"]
    said |= _encoder(params["encoder_factory"], settings["observation_shape"])
    said |= _observations(_scaler(params, "observation_scaler"))
    if (scaler := _scaler(params, "reward_scaler")) is not None and "reward_scaler" not in ignored:
        said["return_scale"] = _return_scale(*scaler)
    if (scaler := _scaler(params, "action_scaler")) is not None and "action_scaler" not in ignored:
        _require_unit_box(*scaler)
    return said


def _scaler(params: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any]] | None:
    """The kind of a scaler and what it holds; ``None`` where there is none."""
    scaler = params.get(name)
    return None if not scaler or scaler["type"] == "none" else (scaler["type"], scaler["params"])


def _encoder(factory: Mapping[str, Any], shape: Any) -> dict[str, Any]:
    params = factory["params"]
    for name in params:
        if name not in ENCODER:
            raise DtLensError(
                f"d3rlpy's configuration of the encoder has an option {name!r} that dt-lens does not know."
            )
    if factory["type"] not in ("default", "vector", "pixel"):
        raise DtLensError(
            f"This d3rlpy model reads states through an encoder of type {factory['type']!r}; dt-lens knows 'default', "
            "'vector' and 'pixel'."
        )
    said = {"encoder_act": params["activation"]}
    if params.get("exclude_last_activation"):
        said["encoder_last_act"] = "none"
    elif params.get("last_activation"):
        said["encoder_last_act"] = params["last_activation"]
    if params.get("filters"):
        said["strides"] = [stride for _, _, stride in params["filters"]]
    if len(shape) == 3:
        if shape[1] != shape[2]:
            raise DtLensError(
                f"This d3rlpy model reads images of {shape[1]} x {shape[2]}; dt-lens reads square ones only."
            )
        said["image_side"] = shape[1]
    return said


def _observations(scaler: tuple[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """The mean and the scale that states are normalised by."""
    match scaler:
        case None:
            return {}
        case ("standard", {"mean": mean, "std": std, **rest}):
            return {"state_mean": mean, "state_std": [s + rest.get("eps", 1e-3) for s in std]}
        case ("min_max", {"minimum": low, "maximum": high}):
            pairs = list(zip(low, high, strict=True))
            return {"state_mean": [(a + b) / 2 for a, b in pairs], "state_std": [(b - a) / 2 for a, b in pairs]}
        case ("pixel", _):
            return {"about": {"observations": DIVIDED}}
        case (kind, _):
            raise DtLensError(f"This d3rlpy model scales observations by {kind!r}, which dt-lens cannot do.")


def _return_scale(kind: str, params: Mapping[str, Any]) -> float:
    multiplier = params.get("multiplier", 1.0)
    if kind == "multiply":
        return 1.0 / float(multiplier)
    if kind == "return":
        return (float(params["return_max"]) - float(params["return_min"])) / float(multiplier)
    raise DtLensError(
        f"This d3rlpy model scales rewards by {kind!r}, which does not divide the return-to-go by a number; to "
        "inspect its weights anyway pass ignore_options=['reward_scaler']."
    )


def _require_unit_box(kind: str, params: Mapping[str, Any]) -> None:
    edges = [*(params.get("minimum") or ()), *(params.get("maximum") or ())]
    if kind != "min_max" or any(abs(abs(edge) - 1.0) > 1e-3 for edge in edges):
        raise DtLensError(
            f"This d3rlpy model scales its actions by {kind!r} and dt-lens gives them to the environment as they are; "
            "to inspect its weights anyway pass ignore_options=['action_scaler']."
        )
