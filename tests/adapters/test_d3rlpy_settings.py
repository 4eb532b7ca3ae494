"""What d3rlpy's configuration says, and what of it dt-lens cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from dt_lens.errors import DtLensError
from dt_lens_adapters.d3rlpy_settings import said_by_settings

NONE = {"type": "none", "params": {}}
VECTOR = {"type": "vector", "params": {"hidden_units": [9, 16], "activation": "swish", "last_activation": "tanh"}}
PIXEL = {"type": "pixel", "params": {"filters": [[32, 8, 4], [64, 4, 2]], "activation": "relu"}}
BOX = {"type": "min_max", "params": {"minimum": [-2.0], "maximum": [2.0]}}


def settings(shape: Any = (5,), **params: Any) -> dict[str, Any]:
    usual = {
        "num_heads": 2, "activation_type": "gelu", "context_size": 4, "max_timestep": 30, "encoder_factory": VECTOR,
        "observation_scaler": NONE, "action_scaler": NONE, "reward_scaler": NONE,
    }  # fmt: skip
    return {"observation_shape": list(shape), "action_size": 3, "config": {"type": "x", "params": usual | params}}


def test_what_is_said() -> None:
    said = said_by_settings(settings(embed_activation_type="tanh"))
    assert said == {
        "n_heads": 2, "act_fn": "gelu", "context": 4, "max_timestep": 30, "embed_act": "tanh",
        "encoder_act": "swish", "encoder_last_act": "tanh",
    }  # fmt: skip
    said = said_by_settings(settings((4, 84, 84), encoder_factory=PIXEL))
    assert said["strides"] == [4, 2] and said["image_side"] == 84 and "encoder_last_act" not in said
    bare = {"type": "vector", "params": {"activation": "relu", "exclude_last_activation": True}}
    assert said_by_settings(settings(encoder_factory=bare))["encoder_last_act"] == "none"
    assert said_by_settings({}) == {}


@pytest.mark.parametrize(
    ("name", "kind", "params", "expected"),
    [
        ("observation", "standard", {"mean": [1.0], "std": [2.0], "eps": 0.5}, ([1.0], [2.5])),
        ("observation", "standard", {"mean": [1.0], "std": [2.0]}, ([1.0], [2.001])),
        ("observation", "min_max", {"minimum": [0.0], "maximum": [4.0]}, ([2.0], [2.0])),
        ("reward", "multiply", {"multiplier": 0.01}, 100.0),
        ("reward", "return", {"return_max": 90.0, "return_min": 10.0, "multiplier": 2.0}, 40.0),
        ("action", "min_max", {"minimum": [-1.0, -0.9999], "maximum": [1.0, 1.0]}, None),
    ],
)
def test_scalers_that_can_be_done(name: str, kind: str, params: dict[str, Any], expected: Any) -> None:
    said = said_by_settings(settings(**{f"{name}_scaler": {"type": kind, "params": params}}))
    if name == "observation":
        assert (said["state_mean"], said["state_std"]) == expected
    else:
        assert said.get("return_scale") == expected


@pytest.mark.parametrize(
    ("params", "message", "ignored"),
    [
        ({"encoder_factory": {"type": "simba", "params": {}}}, "an encoder of type 'simba'", None),
        ({"observation_scaler": {"type": "tuple", "params": {}}}, "scales observations by 'tuple'", None),
        ({"reward_scaler": {"type": "standard", "params": {}}}, "scales rewards by 'standard'", "reward_scaler"),
        ({"action_scaler": BOX}, "scales its actions by 'min_max'", "action_scaler"),
        ({"encoder_factory": None}, "is not of the form that dt-lens knows", None),
        ({"reward_scaler": {"type": "multiply", "params": {"multiplier": 0}}}, "is not of the form", "reward_scaler"),
    ],
)
def test_what_is_refused(params: dict[str, Any], message: str, ignored: str | None) -> None:
    with pytest.raises(DtLensError, match=message) as caught:
        said_by_settings(settings(**params))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    if ignored:
        assert "n_heads" in said_by_settings(settings(**params), [ignored])


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(DtLensError, match="reads images of 84 x 80; dt-lens reads square ones only"):
        said_by_settings(settings((4, 84, 80), encoder_factory=PIXEL))
