"""Laws of the language models' layouts, for models of any shape."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens import SingularEdit

KINDS = ("bloom", "gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "opt", "phi3", "qwen2")
NORMED = ("gemma2", "gemma3", "olmo2", "qwen3")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    kind = draw(st.sampled_from([*KINDS, *NORMED]))
    heads, d_head = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4))
    d, layers, vocabulary = heads * d_head, draw(st.integers(1, 3)), draw(st.integers(2, 40))
    mlp = draw(st.sampled_from([d, draw(st.integers(1, 40))]))
    if kind in ("gpt2", "gptj"):
        sizes = {"n_embd": d, "n_head": heads, "n_layer": layers, "vocab_size": vocabulary, "n_inner": mlp}
        return kind, sizes if kind == "gpt2" else {**sizes, "rotary_dim": draw(st.sampled_from([2, d_head]))}
    if kind == "bloom":
        return kind, {"hidden_size": d, "vocab_size": vocabulary, "n_head": heads, "n_layer": layers}
    sizes = {"hidden_size": d, "vocab_size": vocabulary, "intermediate_size": mlp}
    if kind == "opt":
        sizes = {"hidden_size": d, "vocab_size": vocabulary, "ffn_dim": mlp, "enable_bias": draw(st.booleans())}
        return kind, {**sizes, "num_attention_heads": heads, "num_hidden_layers": layers, "pad_token_id": None}
    if kind == "gpt_neo":
        return kind, {**sizes, "num_heads": heads, "num_layers": layers, "attention_types": [[["global"], layers]]}
    if kind == "gpt_neox":
        sizes |= {
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "rotary_pct": draw(st.sampled_from([0.5, 1.0])),
        }
        return kind, {**sizes, "use_parallel_residual": draw(st.booleans()), "attention_bias": draw(st.booleans())}
    shared = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    if kind in ("gemma2", "gemma3", "qwen3"):
        sizes["head_dim"] = draw(st.sampled_from([2, 6]))
    return kind, {
        **sizes,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": shared,
        "pad_token_id": None,
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(shape=shapes(), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_sizes_the_layout_is_proven_and_edits_are_undone(
    shape: tuple[str, dict[str, Any]], seed: int, make_lm: Any
) -> None:
    kind, sizes = shape
    model = make_lm(kind, seed=seed, **sizes)
    lens = dt_lens.wrap(model)  # certified
    tokens = lens.probe(seed)["tokens"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = lens(tokens)
    torch.testing.assert_close(plain, model(tokens).logits, rtol=1e-4, atol=1e-4)
    with SingularEdit(lens, "blocks.0.attn.OV.0", sv=0, side="write", value="flip"):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
