"""llama2.c's forward pass, after its model.py, and a random state dict under its names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 29, "max_seq_len": 12}


def random_tensors(hidden: int = 40, tied: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a model of these sizes; ``output`` is the token table itself if tied, as train.py saves it."""
    torch.manual_seed(seed)
    d, kv = SIZES["dim"], SIZES["dim"] * SIZES["n_kv_heads"] // SIZES["n_heads"]
    shapes = {"attention.wq": (d, d), "attention.wk": (kv, d), "attention.wv": (kv, d), "attention.wo": (d, d)}
    shapes |= {"feed_forward.w1": (hidden, d), "feed_forward.w2": (d, hidden), "feed_forward.w3": (hidden, d)}
    tensors = {"tok_embeddings.weight": torch.randn(SIZES["vocab_size"], d)}
    for layer in range(SIZES["n_layers"]):
        for name, shape in shapes.items():
            tensors[f"layers.{layer}.{name}.weight"] = torch.randn(shape) * 0.3
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"layers.{layer}.{name}.weight"] = 1 + 0.3 * torch.randn(d)
    tensors["norm.weight"] = 1 + 0.3 * torch.randn(d)
    tensors["output.weight"] = tensors["tok_embeddings.weight"] if tied else torch.randn(SIZES["vocab_size"], d)
    return tensors


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, theta: float) -> Tensor:
    """Each pair of neighbouring features as a complex number, turned by the position."""
    size = x.shape[-1]
    freqs = 1.0 / (theta ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(x.shape[1]).float(), freqs)
    turned = (
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(3)


def logits(tokens: Tensor, tensors: Mapping[str, Tensor], eps: float = 1e-5, theta: float = 1e4) -> Tensor:
    """What the model of these tensors says of the next tokens, ``[batch, pos, vocab]``."""
    x = tensors["tok_embeddings.weight"][tokens]
    n, t, d = x.shape
    size = d // SIZES["n_heads"]
    for layer in range(SIZES["n_layers"]):
        own = {key.removeprefix(f"layers.{layer}.").removesuffix(".weight"): W for key, W in tensors.items()}
        h = _norm(x, own["attention_norm"], eps)
        q, k, v = ((h @ own[f"attention.w{letter}"].T).view(n, t, -1, size) for letter in "qkv")
        q, k = _rotated(q, theta), _rotated(k, theta)
        k, v = (part.repeat_interleave(SIZES["n_heads"] // SIZES["n_kv_heads"], 2) for part in (k, v))
        scores = torch.einsum("nqhe,nkhe->nhqk", q, k) / size**0.5
        scores = scores + torch.full((t, t), float("-inf")).triu(1)
        z = torch.einsum("nhqk,nkhe->nqhe", scores.softmax(-1), v).flatten(2)
        x = x + z @ own["attention.wo"].T
        h = _norm(x, own["ffn_norm"], eps)
        h = F.silu(h @ own["feed_forward.w1"].T) * (h @ own["feed_forward.w3"].T)
        x = x + h @ own["feed_forward.w2"].T
    return _norm(x, tensors["norm.weight"], eps) @ tensors["output.weight"].T


def exported(tensors: Mapping[str, Tensor], version: int) -> bytes:
    """The bytes of a model.bin, written part by part in the order in which run.c's pointers move on."""
    args = SIZES
    d, layers, size = args["dim"], range(args["n_layers"]), args["dim"] // args["n_heads"]
    shared = torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    vocabulary = args["vocab_size"] if shared or version else -args["vocab_size"]
    hidden = len(tensors["layers.0.feed_forward.w1.weight"])
    sizes = [d, hidden, args["n_layers"], args["n_heads"], args["n_kv_heads"], vocabulary, args["max_seq_len"]]
    head = b"".join(number.to_bytes(4, "little", signed=True) for number in sizes)

    def numbers(*keys: str) -> bytes:
        return b"".join(tensors[f"{key}.weight"].contiguous().numpy().astype("<f4").tobytes() for key in keys)

    def all_layers(*parts: str) -> bytes:
        return b"".join(numbers(*(f"layers.{layer}.{part}" for layer in layers)) for part in parts)

    attention = all_layers(*(f"attention.w{letter}" for letter in "qkvo"))
    mlp = all_layers(*(f"feed_forward.w{number}" for number in (1, 2, 3)))
    output = b"" if shared else numbers("output")
    if version == 0:
        body = numbers("tok_embeddings") + all_layers("attention_norm") + attention + all_layers("ffn_norm") + mlp
        return head + body + numbers("norm") + bytes(4 * args["max_seq_len"] * size) + output
    start = (b"24ka" + version.to_bytes(4, "little") + head + bytes([shared])).ljust(256, b"\0")
    norms = all_layers("attention_norm", "ffn_norm") + numbers("norm", "tok_embeddings")
    return start + norms + attention + mlp + output
