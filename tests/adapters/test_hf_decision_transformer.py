"""Hugging Face's decision transformer: live, from a folder, half precision, subclasses, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import dt_lens
from dt_lens import SingularEdit, WeightSVD
from dt_lens.errors import DtLensError


def predictions(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**batch)
    return torch.cat([out.state_preds, out.action_preds, out.return_preds], -1)


def rewrite(folder: Path, **values: Any) -> None:
    """Change fields of config.json; ``None`` removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def folder(make_hf: Any, tmp_path: Path) -> Path:
    """What Hugging Face's own save_pretrained writes, which knows no run facts."""
    make_hf().save_pretrained(tmp_path / "agent")
    return tmp_path / "agent"


def test_a_folder_that_hugging_face_wrote(make_hf: Any, make_batch: Any, folder: Path) -> None:
    lens = dt_lens.load(folder)
    hf = make_hf()
    batch = make_batch(hf.config, padding="left")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(predictions(lens, batch)[real], predictions(hf, batch)[real], rtol=1e-5, atol=1e-5)
    assert lens.facts.context == 20 and lens.facts.environment is None and not lens.training
    # The lens looks at a model of Hugging Face's class over the very tensors of the file.
    assert torch.equal(predictions(lens.original, batch), predictions(hf, batch))


def test_what_the_file_does_not_say_is_given(folder: Path) -> None:
    lens = dt_lens.load(
        folder, context=5, environment="CartPole-v1", state_mean=torch.zeros(5), state_std=[1] * 5, target_returns=[7],
        check=False,
    )  # fmt: skip
    assert lens.cfg.n_ctx == lens.facts.context == 5 and lens.facts.environment == "CartPole-v1"
    assert lens.facts.state_mean == (0.0,) * 5 and lens.facts.target_returns == (7.0,)
    assert dt_lens.load(folder, discrete_actions=True, check=False).cfg.discrete_actions


def test_the_pickled_form_and_shards(make_hf: Any, make_batch: Any, folder: Path) -> None:
    batch = make_batch(make_hf().config)
    expected = predictions(dt_lens.load(folder, check=False), batch)
    tensors = dict(make_hf().state_dict())
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(predictions(dt_lens.load(folder, check=False), batch), expected)
    (folder / "pytorch_model.bin").unlink()
    keys = sorted(tensors)
    shards = {"one.bin": keys[::2], "two.bin": keys[1::2]}
    for shard, part in shards.items():
        torch.save({key: tensors[key] for key in part}, folder / shard)
    index = {"weight_map": {key: shard for shard, part in shards.items() for key in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(predictions(dt_lens.load(folder, check=False), batch), expected)
    (folder / "two.bin").unlink()
    with pytest.raises(DtLensError, match=r"no file .*two\.bin', though pytorch_model\.bin\.index\.json names it\.$"):
        dt_lens.load(folder)


def test_the_masks_of_older_releases_are_passed_over(make_hf: Any, make_batch: Any, folder: Path) -> None:
    """A suffix match on "attn.bias" would take "attn.c_attn.bias" along, an error without a crash."""
    (folder / "model.safetensors").unlink()
    tensors = dict(make_hf().state_dict())
    for layer in range(2):
        tensors[f"encoder.h.{layer}.attn.bias"] = torch.ones(1, 1, 60, 60, dtype=torch.uint8).tril()
        tensors[f"encoder.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(tensors, folder / "pytorch_model.bin")
    lens = dt_lens.load(folder, check=False)
    for layer in range(2):
        bias = tensors[f"encoder.h.{layer}.attn.c_attn.bias"]
        mine = [lens.weights[f"blocks.{layer}.attn.b_{letter}"].flatten() for letter in "QKV"]
        assert torch.equal(torch.cat(mine), bias) and bias.abs().sum() > 0
    batch = make_batch(make_hf().config)
    torch.testing.assert_close(predictions(lens, batch), predictions(make_hf(), batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(make_hf: Any, make_batch: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    hf = make_hf().to(dtype)
    lens = dt_lens.wrap(hf)
    batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in make_batch(hf.config).items()}
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(predictions(lens, batch), predictions(hf, batch), rtol=tolerance, atol=tolerance)
    dt_lens.save_pretrained(lens, tmp_path)
    again = dt_lens.load(tmp_path, check=False)
    assert all(torch.equal(again.weights[name], weight) for name, weight in lens.weights.items())
    assert {weight.dtype for weight in again.weights.values()} == {dtype}


def test_a_subclass_that_returns_its_loss(make_hf: Any, make_batch: Any) -> None:
    """The way in which Hugging Face teaches to train a decision transformer."""
    from transformers import DecisionTransformerModel

    class Trainable(DecisionTransformerModel):
        def forward(self, **batch: Any) -> Any:
            out = super().forward(**batch)
            return {"loss": (out.action_preds - batch["actions"]).pow(2).mean()}

    hf = make_hf()
    model = Trainable(hf.config).eval()
    model.load_state_dict(hf.state_dict())
    lens = dt_lens.wrap(model)
    batch = make_batch(hf.config)
    torch.testing.assert_close(predictions(lens, batch), predictions(hf, batch), rtol=1e-5, atol=1e-5)
    assert lens.original is model


def test_looking_leaves_no_trace_on_the_model(make_hf: Any) -> None:
    hf = make_hf().train()
    attention = hf.config._attn_implementation
    dt_lens.wrap(hf)
    assert hf.training and hf.config._attn_implementation == attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_wrapping_twice_and_wrapping_a_lens(make_hf: Any) -> None:
    hf = make_hf()
    one, two = dt_lens.wrap(hf, check=False), dt_lens.wrap(hf, check=False)
    assert one.identity != two.identity
    one.weights["blocks.0.mlp.W_in"][0, 0] = 7.0
    assert two.weights["blocks.0.mlp.W_in"][0, 0] == 7.0
    assert dt_lens.wrap(one) is one
    with pytest.raises(DtLensError, match=r"wrapped already, so context= cannot change it; leave it out\.$"):
        dt_lens.wrap(one, context=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_function": "gelo"}, r"activation_function is 'gelo'; dt-lens knows relu, .* mean 'gelu'\?$"),
        ({"activation_function": ["relu"]}, "activation_function is"),
        ({"activation_function": 3}, "activation_function is 3"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"hidden_size": "16"}, "d_model is '16'; it must be a positive whole number"),
        ({"hidden_size": -16}, "d_model is -16"),
        ({"hidden_size": 10**15}, r"has shape \[16, 1\]; \[1000000000000000, 1\] was expected"),
        ({"hidden_size": 16.0}, r"d_model is 16\.0"),
        ({"hidden_size": None}, r"shape \[16, 1\]; \[128, 1\] was expected"),
        ({"n_head": 3}, "d_model 16 does not split into n_heads 3 equal heads"),
        ({"n_head": 0}, "n_heads is 0"),
        ({"n_head": True}, "n_heads is True"),
        ({"n_layer": 3}, "holds 2 blocks and its configuration says 3"),
        ({"n_layer": 10**12}, "holds 2 blocks and its configuration says 1000000000000"),
        ({"n_layer": 1}, "holds 2 blocks and its configuration says 1"),
        ({"n_inner": 65}, r"c_fc\.weight' has shape \[16, 64\]; \[16, 65\] was expected"),
        ({"n_inner": [64]}, r"d_mlp is \[64\]"),
        ({"state_dim": None}, r"'embed_state\.weight' has shape \[16, 5\]; \[16, 17\] was expected"),
        ({"state_dim": {}}, "state_dim is {}"),
        ({"max_ep_len": 10**18}, r"embed_timestep\.weight"),
        ({"n_positions": -1}, "n_position is -1"),
        ({"layer_norm_epsilon": "1e-5"}, "eps is '1e-5'; it must be a small number of 0 or more"),
        ({"layer_norm_epsilon": -1.0}, r"eps is -1\.0"),
        ({"layer_norm_epsilon": 1e30}, r"eps is 1e\+30; it must be a small number"),
        ({"action_tanh": "false"}, "action_tanh is 'false'; it must be true or false"),
        ({"scale_attn_weights": 1}, "attn_scale_by_head is 1"),
        ({"attn_pdrop": 7}, "attn_dropout is 7"),
        ({"rotary": True}, r"an option 'rotary' that .* does not have, .* pass ignore_options=\['rotary'\]"),
        ({"initializer_range": "wide"}, "Hugging Face's class refuses this configuration"),
    ],
)
def test_a_configuration_that_makes_no_model(folder: Path, values: dict[str, Any], message: str) -> None:
    rewrite(folder, **values)
    with pytest.raises(DtLensError, match=message) as caught:
        dt_lens.load(folder)
    assert str(caught.value).endswith((".", "?")) and "\n" not in str(caught.value)


def test_options_that_do_nothing(make_hf: Any, make_batch: Any, folder: Path) -> None:
    batch = make_batch(make_hf().config)
    expected = predictions(dt_lens.load(folder, check=False), batch)
    rewrite(
        folder, vocab_size=10**12, max_length=20, summary_type="cls_index", _name_or_path="x", torch_dtype="float32"
    )
    assert torch.equal(predictions(dt_lens.load(folder), batch), expected)
    rewrite(folder, rotary=False)
    assert torch.equal(predictions(dt_lens.load(folder, ignore_options=["rotary"]), batch), expected)


@pytest.mark.parametrize("field", ["n_layer", "action_tanh", "activation_function"])
def test_a_field_left_out_has_hugging_faces_default(make_hf: Any, tmp_path: Path, field: str) -> None:
    make_hf(n_layer=3, activation_function="relu", action_tanh=True).save_pretrained(tmp_path)
    rewrite(tmp_path, **{field: None})
    cfg = dt_lens.load(tmp_path, check=False).cfg
    assert (cfg.n_layers, cfg.act_fn, cfg.action_tanh) == (3, "relu", True)


def test_tensors_that_do_not_fit(make_hf: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    good = dict(make_hf().state_dict())
    key = "encoder.h.1.mlp.c_fc.weight"
    for tensors, message in (
        ({k: v for k, v in good.items() if k != key}, rf"has no tensor '{key}', which .* needs\.$"),
        ({**good, "encoder.h.1.mlp.c_fc.weigth": good[key]}, r"c_fc\.weigth' that .* no place for\. Did you mean"),
        ({**good, key: good[key].T.contiguous()}, rf"'{key}' has shape \[64, 16\]; \[16, 64\] was expected\.$"),
        ({**good, key: good[key][0]}, r"has shape \[64\]; \[16, 64\] was expected\.$"),
        (
            {**good, key: good[key].to(torch.int32)},
            r"c_fc\.weight' holds int32 numbers; weights must be float64, .*\.$",
        ),
        ({k: v.to(torch.int8) for k, v in good.items()}, r"holds int8 numbers; weights must be float64, .*\.$"),
        (
            {**good, key: good[key].half()},
            r"float16 on cpu; convert the model to one type and one device with \.to\(\)\.$",
        ),
        ({**good, key: good[key] + float("nan")}, rf"'{key}' in .* holds NaN or infinite values; .*\.$"),
    ):
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(folder)


def test_facts_that_do_not_fit(folder: Path) -> None:
    for given, message in (
        ({"state_mean": [0.0] * 4, "state_std": [1.0] * 4}, "state_mean has 4 entries; the model's state has 5"),
        ({"action_labels": ["x"]}, "action_labels has 1 entries; the model's action has 3"),
        ({"contxt": 3}, r"Unknown option 'contxt' .* mean 'context'\?$"),
        ({"ignore_options": "rotary"}, r"ignore_options is 'rotary'; it must be a list of names of options\.$"),
        ({"context": 0}, "context is 0; it must be a positive number of steps"),
        ({"discrete_actions": "yes"}, "discrete_actions is 'yes'"),
        ({"return_scale": "many"}, "return_scale is 'many'; it must be a positive number"),
    ):
        with pytest.raises(DtLensError, match=message):
            dt_lens.load(folder, **given)
    (folder / "dt_lens.json").write_text('{"context": 3, "enviroment": "Hopper-v5"}')
    with pytest.raises(DtLensError, match=r"dt_lens\.json has an unknown field 'enviroment'.* mean 'environment'"):
        dt_lens.load(folder)
    (folder / "dt_lens.json").write_text('{"context": ')
    with pytest.raises(DtLensError, match=r"dt_lens\.json cannot be read as JSON"):
        dt_lens.load(folder)


def test_weights_without_their_configuration(folder: Path) -> None:
    assert (
        dt_lens.load(folder / "model.safetensors", check=False).cfg == dt_lens.load(folder, check=False).cfg
    )  # found beside
    (folder / "config.json").unlink()
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(DtLensError, match=r"has no config\.json beside it, .* holds both, or pass n_heads=\.$"):
            dt_lens.load(path)


def test_a_file_of_any_name(make_hf: Any, make_batch: Any, folder: Path) -> None:
    """Its ``config.json`` beside it says the rest, and without that the user does."""
    expected = predictions(dt_lens.load(folder, check=False), batch := make_batch(make_hf().config))
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    torch.save({"state_dict": make_hf().state_dict(), "step": 3}, folder / "last.ckpt")
    for name in ("best.safetensors", "last.ckpt"):
        assert torch.equal(predictions(dt_lens.load(folder / name, check=False), batch), expected)
    with pytest.raises(DtLensError, match="Unknown option 'n_heads'"):
        dt_lens.load(folder / "last.ckpt", n_heads=2)
    for config in (None, {"model_type": "gpt2"}):  # another model's is none
        (folder / "config.json").unlink()
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        lens = dt_lens.load(folder / "last.ckpt", n_heads=2)
        assert torch.equal(predictions(lens, batch), expected) and lens.cfg.position == "constant"
        (folder / "config.json").touch()
    with pytest.raises(DtLensError, match=r"act_fn is 'rely'; .* mean 'relu'\?$"):
        dt_lens.load(folder / "last.ckpt", n_heads=2, act_fn="rely")


def test_the_width_as_some_called_it_in_2022(make_hf: Any, make_batch: Any, folder: Path) -> None:
    expected = predictions(dt_lens.load(folder, check=False), batch := make_batch(make_hf().config))
    for values in ({"n_embd": 16}, {"n_embd": 16, "hidden_size": None}, {"n_embd": 768, "hidden_size": 16}):
        rewrite(folder, **values)
        assert torch.equal(predictions(dt_lens.load(folder, check=False), batch), expected)


def test_an_action_head_only(make_hf: Any, make_batch: Any, folder: Path) -> None:
    hf = make_hf()
    tensors = {k: v for k, v in hf.state_dict().items() if not k.startswith(("predict_state", "predict_return"))}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    lens = dt_lens.load(folder)
    assert lens.cfg.predicts == ("action",) and not {"state_out", "reward_out"} & set(lens.embeddings)
    with torch.no_grad():
        mine, theirs = lens(**(batch := make_batch(hf.config))), hf(**batch)
    torch.testing.assert_close(mine.action_preds, theirs.action_preds, rtol=1e-5, atol=1e-5)
    assert mine.state_preds is None
    torch.save({**tensors, "predict_state.weight": hf.predict_state.weight.data}, folder / "pytorch_model.bin")
    with pytest.raises(DtLensError, match=r"no tensor 'predict_state\.bias'"):
        dt_lens.load(folder)


def hf_return(hf: Any, seed: int, target: float, context: int, limit: int) -> float:
    """An episode of CartPole played by Hugging Face's class itself, the likelier action at every step."""
    env = gym.make("CartPole-v1")
    x, _ = env.reset(seed=seed)
    states, actions, rests, total = [x], [], [target], 0.0
    for step in range(limit):
        start = max(0, step + 1 - context)
        one_hot = torch.zeros(1, step + 1, 2)
        for i, action in enumerate(actions):
            one_hot[0, i, action] = 1
        with torch.no_grad():
            out = hf(
                states=torch.tensor(np.array(states))[None, start:],
                actions=one_hot[:, start:],
                returns_to_go=torch.tensor(rests)[None, start:, None],
                timesteps=torch.arange(start, step + 1)[None],
            )
        actions.append(int(out.action_preds[0, -1].argmax()))
        x, reward, terminated, truncated, _ = env.step(actions[-1])
        total, states, rests = total + float(reward), [*states, x], [*rests, rests[-1] - float(reward)]
        if terminated or truncated:
            break
    env.close()
    return total


def test_discrete_actions(make_hf: Any, tmp_path: Path) -> None:
    """Trained with ``action_tanh=False``: its predictions are logits, which no file says."""
    hf = make_hf(seed=1, state_dim=4, act_dim=2, action_tanh=False)
    hf.save_pretrained(tmp_path)
    facts = {"environment": "CartPole-v1", "target_returns": [20.0], "context": 3}
    lens = dt_lens.load(tmp_path, check=False, **facts)
    with pytest.raises(DtLensError, match=r"predicts continuous ones; if they are logits, pass discrete_actions=True"):
        dt_lens.evaluate(lens, episodes=1)
    for lens in (
        dt_lens.load(tmp_path, discrete_actions=True, check=False, **facts),
        dt_lens.wrap(hf, discrete_actions=True, check=False, **facts),
    ):
        assert dt_lens.certify(lens).against == "the original model"
        table = WeightSVD(lens).scan(matrices=["*.W_out"], embeddings=["action_out"], null="haar", seed=0)
        assert set(table["label"]) <= {"push left", "push right"} and len(table)
        before = dt_lens.evaluate(lens, episodes=8, seed=0, max_steps=30, workers=1)
        assert list(before.to_frame()["return"])[:4] == [hf_return(hf, seed, 20.0, 3, 30) for seed in range(4)]
        with SingularEdit(lens, "blocks.0.mlp.W_in"):
            edited = dt_lens.evaluate(lens, episodes=8, seed=0, max_steps=30, workers=1)
        assert list(edited.to_frame()["return"]) != list(before.to_frame()["return"])
        assert "8 paired episodes" in str(edited.compare(before))


def test_a_model_without_numbers(make_hf: Any) -> None:
    with torch.device("meta"):
        hf = make_hf()
    with pytest.raises(DtLensError, match="is on the meta device"):
        dt_lens.wrap(hf)
