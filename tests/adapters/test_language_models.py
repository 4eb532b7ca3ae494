"""GPT-2, GPT-J, GPT-Neo(X), Llama and its kin: the lens computes what Hugging Face does; nothing wrong is certified."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.lens.hooks import BY_CHOICE
from dt_lens.lens.matrices import catalogue
from dt_lens_adapters.bloom import FAMILY as BLOOM
from dt_lens_adapters.gemma import GEMMA2, GEMMA3
from dt_lens_adapters.gpt2 import FAMILY as GPT2
from dt_lens_adapters.gpt_neo import FAMILY as GPT_NEO
from dt_lens_adapters.gpt_neox import FAMILY as GPT_NEOX
from dt_lens_adapters.gptj import FAMILY as GPTJ
from dt_lens_adapters.llama import LLAMA, MISTRAL, QWEN2
from dt_lens_adapters.olmo2 import FAMILY as OLMO2
from dt_lens_adapters.opt import FAMILY as OPT
from dt_lens_adapters.phi3 import FAMILY as PHI3
from dt_lens_adapters.qwen3 import FAMILY as QWEN3

NORMED = (GEMMA2, GEMMA3, OLMO2, QWEN3)
FAMILIES = {
    family.name: family for family in (BLOOM, GPT2, GPTJ, GPT_NEO, GPT_NEOX, LLAMA, MISTRAL, OPT, PHI3, QWEN2, *NORMED)
}
SHARING = ("llama", "mistral", "phi3", "qwen2", *(family.name for family in NORMED))  # of keys and values
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])


# test_normed_decoders.py tries the other two, whose parts Gemma 2 and OLMo 2 have here.
@pytest.fixture(params=[name for name in FAMILIES if name not in ("gemma3", "qwen3")])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rewired(model: Any, family: Any, **changes: Any) -> HookedLanguageModel:
    """The lens that a wrong configuration makes."""
    cfg = dt_lens.wrap(model, check=False).cfg
    return HookedLanguageModel(model, family, cfg.replace(**changes))


def redeclared(family: Any, **rules: Any) -> Any:
    """The family with other rules for a block's weights; dots are written as two underscores."""
    return replace(family, block={**family.block, **{name.replace("__", "."): at for name, at in rules.items()}})


class Disguised(HookedLanguageModel):
    """A lens that shows other weights than the model's."""

    disguise: Callable[[dict[str, Tensor]], None]

    @property
    def weights(self) -> dict[str, Tensor]:
        found = dict(super().weights)
        if "disguise" in self.__dict__:
            self.disguise(found)
        return found


def disguised(model: Any, family: Any, disguise: Callable[[dict[str, Tensor]], None]) -> Disguised:
    lens = Disguised(model, family, dt_lens.wrap(model, check=False).cfg)
    lens.disguise = disguise
    return lens


def refused(lens: Any, part: str) -> None:
    with pytest.raises(DtLensError, match=part) as caught:
        dt_lens.certify(lens)
    assert "\n" not in str(caught.value)


def test_the_lens_computes_what_the_model_does_and_the_model_stays_as_it_was(kind: str, make_lm: Any) -> None:
    model = make_lm(kind)
    keys, mode, wanted = list(model.state_dict()), model.config._attn_implementation, model(TOKENS).logits
    lens = dt_lens.wrap(model)
    torch.testing.assert_close(lens(TOKENS), wanted, rtol=1e-5, atol=1e-5)  # a sum's order goes by where it lies
    out, cache = lens.run_with_cache(TOKENS)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)  # eager attention, which shows the pattern
    # What each head writes is cached when it is asked for.
    assert set(cache) == {name for name in lens.hook_dict if not name.endswith(BY_CHOICE)}
    assert lens.original is model
    torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == mode
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_weight_is_the_models_own_memory(kind: str, make_lm: Any) -> None:
    model = make_lm(kind)
    lens = dt_lens.wrap(model, check=False)
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shown = sum(weight.numel() for name, weight in lens.weights.items() if name != "unembed.W_U" or not lens.cfg.tied)
    assert all(weight.untyped_storage().data_ptr() in memory for weight in lens.weights.values())
    unshown = 2 * 16 if kind == "opt" else 0  # the two rows of the table of positions that only padding reads
    assert shown + unshown == sum(parameter.numel() for parameter in model.parameters())


def test_certified_with_a_proof_of_every_matrix_and_table(kind: str, make_lm: Any) -> None:
    proof = dt_lens.certify(dt_lens.wrap(make_lm(kind), check=False))
    assert proof.against == "the original model"
    assert {"embed.W_E", "unembed.W_U", "blocks.1.attn.OV.1", "blocks.1.mlp.W_out"} <= set(proof.errors)
    assert ("blocks.0.mlp.W_gate" in proof.errors) == ("mlp.W_gate" in FAMILIES[kind].block)
    normed = "attn.q_norm.w" in FAMILIES[kind].block
    assert ("blocks.1.attn.QK.0" in proof.errors) == (not normed)
    assert ("blocks.1.attn.k_norm" in proof.errors) == normed
    assert proof.worst < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_every_type(kind: str, dtype: torch.dtype, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind, size=0.2).to(dtype))
    assert lens(TOKENS).dtype == dtype
    with SingularEdit(lens, "blocks.1.mlp.W_out", sv=0):
        pass


@pytest.mark.parametrize("matrix", ["mlp.W_in", "mlp.W_out", "attn.OV.1", "attn.QK.0", "attn.W_V"])
def test_an_edit_is_seen_by_the_model_and_undone_bit_for_bit(kind: str, matrix: str, make_lm: Any) -> None:
    model = make_lm(kind)
    lens = dt_lens.wrap(model, check=False)
    if f"blocks.1.{matrix}" not in catalogue(lens):
        pytest.skip(f"{kind} has no QK circuit")
    before, bits = model(TOKENS).logits, {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sides = {"attn.OV.1": "write", "attn.QK.0": "query"}
    with SingularEdit(lens, f"blocks.1.{matrix}", sv=0, side=sides.get(matrix)):
        assert (model(TOKENS).logits - before).abs().max() > 1e-4
    assert torch.equal(model(TOKENS).logits, before)
    assert all(torch.equal(tensor, bits[key]) for key, tensor in model.state_dict().items())


def test_planted_directions_are_found_with_cosine_one(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    weights, token_in, token_out = lens.weights, lens.embeddings["token_in"], lens.embeddings["token_out"]
    read, write = token_in.directions[7].clone(), token_out.directions[11].clone()
    share = lens.cfg.n_heads // lens.cfg.n_kv_heads
    neurons, inside = torch.randn(lens.cfg.d_mlp), torch.randn(lens.cfg.d_head)
    with torch.no_grad():
        weights["blocks.1.mlp.W_in"].copy_(torch.outer(read, neurons))
        weights["blocks.1.mlp.W_out"].copy_(torch.outer(neurons, write))
        weights["blocks.1.attn.W_V"][1 // share].copy_(torch.outer(read, inside))
        weights["blocks.1.attn.W_O"][1].copy_(torch.outer(inside, write))
    dt_lens.certify(lens)
    svd = WeightSVD(lens, fold_layernorm=False)
    looked = [("mlp.W_in", "token_in", "read", 7), ("mlp.W_out", "token_out", "write", 11)]
    looked += [("attn.OV.1", "token_in", "read", 7), ("attn.OV.1", "token_out", "write", 11)]
    for matrix, embedding, side, token in looked:
        cosines = svd.cosines(f"blocks.1.{matrix}", embedding, side=side, k=1).iloc[0]  # type: ignore[arg-type]
        assert cosines.abs().idxmax() == f"token {token}"
        assert cosines.abs().max() > 1 - 1e-5


def test_saved_and_loaded(kind: str, make_lm: Any, tmp_path: Path) -> None:
    model = make_lm(kind)
    model.save_pretrained(tmp_path)
    lens = dt_lens.load(tmp_path)
    torch.testing.assert_close(lens(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert not lens.training
    assert lens.tokenizer is None
    # What the class computes for itself, such as the frequencies of a rotation, is as in a model built the usual way.
    mine, theirs = dict(lens.model.named_buffers()), dict(model.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(WeightSVD(lens, rank=3).scan(["*.W_out", "*.OV.*"], seed=0))


def test_in_shards_with_a_tokenizer_of_its_own(make_lm: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = make_lm("llama")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    words = {f"w{i}": i for i in range(29)}
    whole = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=whole).save_pretrained(tmp_path)
    lens = dt_lens.load(tmp_path)
    assert lens.labels[7] == "w7"
    assert lens.to_tokens("w7").tolist() == [[7]]
    torch.testing.assert_close(lens("w7"), model(torch.tensor([[7]])).logits, rtol=1e-4, atol=1e-5)
    assert dt_lens.load(tmp_path, tokenizer=None).labels[7] == "token 7"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DtLensError, match="pass tokenizer=None"):
        dt_lens.load(tmp_path)


def test_matrices_that_another_layout_would_fit_in_shape_are_refused_in_it(kind: str, make_lm: Any) -> None:
    """nn.Linear's (out, in) read as Conv1D's (in, out), and the other way round, where sizes do not tell."""
    square = {"gpt2": "n_inner", "gptj": "n_inner", "opt": "ffn_dim"}.get(kind, "intermediate_size")
    heads = {"num_key_value_heads": 4} if kind in SHARING else {}
    model, family = make_lm(kind, **{square: 16}, **heads), FAMILIES[kind]
    for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out", "mlp.W_gate"):
        rule = family.block.get(name)
        if rule is None or rule.part is not None:  # the fused one is as high as wide nowhere
            continue
        if kind == "bloom" and name.startswith("mlp"):  # whose width is fixed
            continue
        before, after = rule.pattern.split(" -> ")
        groups = ["(head e)", "d"] if "head" in before else ["(kv e)", "d"] if "kv" in before else ["mlp", "d"]
        swapped = " ".join(groups if before != " ".join(groups) else reversed(groups))
        lens = HookedLanguageModel(
            model,
            redeclared(family, **{name: rule._replace(pattern=f"{swapped} -> {after}")}),
            dt_lens.wrap(model, check=False).cfg,
        )
        refused(lens, rf"{name} does not reproduce.*it looks transposed|OV|{name} does not reproduce")


def test_heads_in_another_order_or_split_another_way_are_refused(kind: str, make_lm: Any) -> None:
    model, family = make_lm(kind), FAMILIES[kind]

    def exchanged(name: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda weights: weights.update({f"blocks.1.attn.{name}": weights[f"blocks.1.attn.{name}"].flip(0)})

    for name in ("W_Q", "W_K", "W_V", "W_O"):
        refused(disguised(model, family, exchanged(name)), f"blocks.1.attn.{name} does not reproduce.*heads look exch")
        rule = family.block[f"attn.{name}"]
        strided = rule.pattern.replace("(head e)", "(e head)").replace("(kv e)", "(e kv)")
        strided = strided.replace("(head part e)", "(part head e)")  # all queries, then all keys
        wrong = redeclared(family, **{f"attn.{name}": rule._replace(pattern=strided)})
        refused(HookedLanguageModel(model, wrong, dt_lens.wrap(model, check=False).cfg), f"attn.{name} does not")


def test_weights_called_by_each_others_names_are_refused(kind: str, make_lm: Any) -> None:
    heads = {"num_key_value_heads": 4} if kind in SHARING else {}
    model, family = make_lm(kind, **heads), FAMILIES[kind]
    pairs = [("attn.W_K", "attn.W_V"), ("attn.W_Q", "attn.W_K")]
    if "mlp.W_gate" in family.block:
        pairs.append(("mlp.W_gate", "mlp.W_in"))
    for a, b in pairs:
        wrong = redeclared(family, **{a: family.block[b], b: family.block[a]})
        lens = HookedLanguageModel(model, wrong, dt_lens.wrap(model, check=False).cfg)
        refused(lens, f"({a}|{b}) does not reproduce.*what belongs there is called|({a}|{b}) does not reproduce")


def test_tables_with_rows_exchanged_are_refused(kind: str, make_lm: Any) -> None:
    model = make_lm(kind)
    for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U"):
        if name in dt_lens.wrap(model, check=False).weights:
            axis = 1 if name == "unembed.W_U" else 0
            lens = disguised(
                model,
                FAMILIES[kind],
                lambda weights, name=name, axis=axis: weights.update({name: weights[name].roll(1, axis)}),
            )
            refused(lens, f"{name} does not")


def test_a_wrong_structure_is_refused(kind: str, make_lm: Any) -> None:
    model, family = make_lm(kind), FAMILIES[kind]
    true = dt_lens.wrap(model, check=False).cfg
    refused(rewired(model, family, attn_scale=(0.1, 0.2)), "the attention scale of block 0")
    other = "relu" if true.act_fn != "relu" else "gelu"
    refused(rewired(model, family, act_fn=other), f"not {other} of its MLP's input")
    other = "rmsnorm" if true.norm == "layernorm" else "layernorm"
    if true.post_norm:
        with pytest.raises(DtLensError, match="post_norm asks for norm='rmsnorm'"):
            rewired(model, family, norm=other)
    else:
        refused(rewired(model, family, norm=other), "ln1|embed_ln")
    with pytest.raises(DtLensError):
        dt_lens.certify(rewired(model, family, parallel=not true.parallel))
    if true.position == "rotary":
        refused(rewired(model, family, position="learned"), "does not reach hook_pos_embed")
    if true.gated:
        with pytest.raises(DtLensError):
            dt_lens.certify(rewired(model, family, gated=False))


def test_a_gate_taken_for_the_input_is_refused_wherever_it_is_taken(make_lm: Any) -> None:
    model = make_lm("llama")
    swapped = replace(LLAMA.modules, mlp_gate=LLAMA.modules.mlp_in, mlp_in=LLAMA.modules.mlp_gate or "")
    gate, up = LLAMA.block["mlp.W_gate"], LLAMA.block["mlp.W_in"]
    both = replace(redeclared(LLAMA, **{"mlp.W_gate": up, "mlp.W_in": gate}), modules=swapped)
    for family in (replace(LLAMA, modules=swapped), both):
        refused(HookedLanguageModel(model, family, dt_lens.wrap(model, check=False).cfg), "neurons of blocks.0")


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_query_heads_that_share_keys_and_values(kv: int, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("llama", num_key_value_heads=kv, attention_bias=True, mlp_bias=True))
    assert lens.weights["blocks.0.attn.W_K"].shape == (kv, 16, 4)
    assert len(WeightSVD(lens)["blocks.0.attn.OV.3"].sigma) == 4
    _, cache = lens.run_with_cache(TOKENS)
    assert cache["blocks.0.attn.hook_k"].shape == (2, 8, kv, 4)
    assert cache["blocks.0.attn.hook_rot_q"].shape == (2, 8, 4, 4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
        ("gpt2", {"n_inner": 20, "activation_function": "relu"}),
        ("gptj", {"rotary_dim": 8}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ],
)
def test_options_of_the_classes(kind: str, options: dict[str, Any], make_lm: Any, tmp_path: Path) -> None:
    model = make_lm(kind, **options)
    lens = dt_lens.wrap(model)
    torch.testing.assert_close(lens.run_with_cache(TOKENS)[0], model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(dt_lens.load(tmp_path)(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_a_head_wider_than_its_share(make_lm: Any) -> None:
    model = make_lm("llama", head_dim=6)
    lens = dt_lens.wrap(model)
    assert lens.cfg.d_head == 6 and lens.weights["blocks.0.attn.W_Q"].shape == (4, 16, 6)
    torch.testing.assert_close(lens.run_with_cache(TOKENS)[0], model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not(kind: str, tied: bool, make_lm: Any, tmp_path: Path) -> None:
    model = make_lm(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for lens in (dt_lens.wrap(model), dt_lens.load(tmp_path)):
        weights = lens.weights
        assert lens.cfg.tied == tied
        assert (weights["embed.W_E"].data_ptr() == weights["unembed.W_U"].data_ptr()) == tied
        assert weights["unembed.W_U"].shape == (16, 29)
        weights = lens.to(torch.float64).weights
        assert (weights["embed.W_E"].data_ptr() == weights["unembed.W_U"].data_ptr()) == tied


def test_a_tied_table_that_the_file_holds_twice_and_differently(make_lm: Any, tmp_path: Path) -> None:
    make_lm("gpt2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, tmp_path / "model.safetensors")
    dt_lens.load(tmp_path)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(DtLensError, match=r"ties 'lm_head\.weight' to the token embedding"):
        dt_lens.load(tmp_path)


def test_checkpoints_of_the_bare_model_and_of_older_releases(make_lm: Any, tmp_path: Path) -> None:
    """The hub's own gpt2 has keys without the prefix, and causal masks among them."""
    model = make_lm("gpt2")
    model.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(tmp_path / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 12, 12) for layer in range(2)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    save_file({**tensors, **masks}, tmp_path / "model.safetensors")
    torch.testing.assert_close(dt_lens.load(tmp_path)(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def _damaged(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DtLensError) as caught:
        dt_lens.load(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: t.update({"transformer.h.0.attn.c_extra.weight": torch.ones(2)}), "attn.c_extra.weight"),
        (lambda t, c: t.update({"transformer.h.2.ln_1.weight": torch.ones(16)}), "of block 2, and its configuration"),
        (lambda t, c: t.update({"transformer.h.0.attn.c_attn_bias": torch.ones(48)}), "c_attn_bias"),
        (lambda t, c: t.pop("transformer.h.1.mlp.c_fc.bias"), "no tensor 'transformer.h.1.mlp.c_fc.bias'"),
        (lambda t, c: t.update({"transformer.ln_f.weight": torch.ones(17)}), r"has shape \[17\]"),
        (lambda t, c: t["transformer.h.1.mlp.c_fc.bias"].fill_(float("nan")), "NaN"),
        (
            lambda t, c: t.update({"transformer.ln_f.weight": torch.ones(16).half()}),
            "is float16",
        ),
        (lambda t, c: t.update({"transformer.ln_f.weight": torch.ones(16, dtype=torch.int32)}), "int32"),
        (lambda t, c: c.update(n_head=3), "n_head is 3"),
        (lambda t, c: c.update(n_layer=0), "n_layer is 0"),
        (lambda t, c: c.update(n_embd="wide"), "n_embd is 'wide'"),
        (lambda t, c: c.update(activation_function="nonsense"), "nonsense"),
        (lambda t, c: c.update(layer_norm_epsilon="x"), "eps is 'x'"),
        (lambda t, c: c.update(n_layer=3), "no tensor 'transformer.h.2"),
        (lambda t, c: c.update(model_type="bert"), "No adapter recognises"),
        (lambda t, c: c.update(architectures=["GPT2ForSequenceClassification"]), "No adapter recognises"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: Any, said: str, make_lm: Any, tmp_path: Path) -> None:
    make_lm("gpt2").save_pretrained(tmp_path)
    assert re.search(said, _damaged(tmp_path, change))


def test_defaults_that_config_json_leaves_out_are_the_classs_own() -> None:
    import transformers

    for name, family in FAMILIES.items():
        said = getattr(transformers, family.architectures[0]).config_class().to_dict()
        for option, value in family.defaults.items():
            if option in said:
                assert said[option] == value, (name, option)
        assert family.config({}) == family.config(said)


def test_unknown_options_and_foreign_models(make_lm: Any) -> None:
    with pytest.raises(DtLensError, match=r"Unknown option 'tokeniser'.*'tokenizer'"):
        dt_lens.wrap(make_lm("gpt2"), tokeniser=None)
    with pytest.raises(DtLensError, match="No adapter recognises this model"):
        dt_lens.wrap(make_lm("gpt2").transformer)


def test_a_weight_that_the_family_does_not_have_is_named(make_lm: Any) -> None:
    model = make_lm("gpt2")
    model.transformer.h[0].attn.lora = torch.nn.Linear(16, 2)
    with pytest.raises(DtLensError, match=r"transformer\.h\.0\.attn\.lora\.weight"):
        dt_lens.wrap(model)
