"""The configuration: what no model can have is refused, and it survives a round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig as Config
from dt_lens.errors import DtLensError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "state_dim is 0; it must be a positive whole number"),
        ({"act_dim": -1}, "act_dim is -1"),
        ({"d_model": 12.0}, r"d_model is 12\.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_heads": None}, "n_heads is None"),
        ({"d_mlp": "64"}, "d_mlp is '64'"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"max_ep_len": float("nan")}, "max_ep_len is nan"),
        ({"n_position": 0}, "n_position is 0"),
        ({"d_model": 10, "n_heads": 4}, "d_model 10 does not split into n_heads 4 equal heads"),
        ({"act_fn": "gelo"}, r"act_fn is 'gelo'; it must be one of relu, .* mean 'gelu'\?"),
        ({"act_fn": ["relu"]}, "act_fn is"),
        ({"normalization": "prae"}, r"mean 'pre'\?"),
        ({"position": None}, "position is None; it must be one of none, constant, learned"),
        (
            {"position": "learned", "n_position": 1},
            "need at least 2, one for the first return-to-go",
        ),
        ({"embed_act": "relu"}, r"embed_act is 'relu'; it must be one of none, tanh"),
        ({"gated_mlp": "yes"}, "gated_mlp is 'yes'"),
        ({"predicts": ["state"]}, r"predicts is \['state'\]; it must be a list of heads with 'action'"),
        ({"predicts": "action"}, "predicts is 'action'"),
        ({"predicts": ["action", "sate"]}, r"predicts names 'sate'; .* mean 'state'\?$"),
        ({"action_tanh": 1}, "action_tanh is 1; it must be true or false"),
        ({"eps": "small"}, "eps is 'small'; it must be a small number of 0 or more"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"embed_ln_eps": -1e-5}, "embed_ln_eps is -1e-05"),
        ({"eps": 10**400}, "eps is 1000"),
        ({"attn_dropout": 10**400}, "attn_dropout is 1000"),
        ({"attn_dropout": 1.5}, r"attn_dropout is 1\.5; it must lie in 0 to 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        Config(**{"state_dim": 4, "act_dim": 2, **options})


def test_round_trip() -> None:
    cfg = Config(4, 2, d_model=24, n_heads=3, position="learned", n_position=60, eps=0, attn_scale_by_layer=True)
    assert Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert cfg.d_head == 8
    assert [cfg.attn_scale(layer) for layer in range(3)] == pytest.approx([8**-0.5 / n for n in (1, 2, 3)])
    headed = Config(4, 2, predicts=("state", "action"))  # type: ignore[arg-type]
    assert headed == Config.from_dict(json.loads(json.dumps(headed.to_dict()))) and hash(headed)
    assert headed == Config(4, 2, predicts=("action", "state")) and headed.predicts == ("action", "state")
    assert cfg.n_actions == 2 and Config(4, 2, action_padding=True).n_actions == 3
    with pytest.raises(DtLensError, match=r"Unknown configuration field 'd_modle'\. Did you mean 'd_model'\?$"):
        Config.from_dict({**cfg.to_dict(), "d_modle": 3})
    with pytest.raises(DtLensError, match="lacks 'act_dim'"):
        Config.from_dict({"state_dim": 3})
