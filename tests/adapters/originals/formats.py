"""Every format that ``load`` knows, as one tiny valid checkpoint each, with an independent reader of its numbers."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dt_lens
from originals import corl, d3rlpy, kzl, kzl_atari, min_dt, minigrid, nano_gpt

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
MASKS = {
    "hf": r"encoder\.wte\.weight|encoder\.h\.\d+\.attn\.(masked_)?bias",
    "kzl": r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    "min_dt": r"transformer\.\d+\.attention\.mask",
    "corl": r"blocks\.\d+\.causal_mask",
    "d3rlpy": r"_gpt2\._transformer\.\d+\._attention\._mask",
    "atari": r"tok_emb\.weight|blocks\.\d+\.attn\.mask",
    "minigrid": r"transformer\.blocks\.\d+\.attn\.(mask|IGNORE)",
}


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint.

    ``write`` puts tensors into an empty folder as the code base would and gives the path for ``load``; ``theirs`` is
    what the code base itself predicts with them, ``mine`` what a lens does, both in float64 where they can be.
    """

    name: str
    adapter: str
    tensors: dict[str, Tensor]
    write: Callable[[Path, Mapping[str, Tensor]], Path]
    mine: Callable[[Any], Tensor]
    theirs: Callable[[Path, Mapping[str, Tensor]], Tensor]
    given: dict[str, Any] = field(default_factory=dict)
    unused: str = r"(?!)"  # keys that are in the file and not in the computation
    marks: frozenset[str] = frozenset()  # keys that every file of this format has
    opens: bool = False  # open_checkpoint reads it too
    zipped: bool = False  # in torch's zip, which holds checksums

    @property
    def used(self) -> list[str]:
        return sorted(key for key in self.tensors if not re.fullmatch(self.unused, key))

    def load(self, path: Path, **given: Any) -> Any:
        return dt_lens.load(path, **{**self.given, **given})

    def called(self, key: str, message: str) -> bool:
        """Whether a message names a tensor, as the file or as the class that runs it does."""
        names = {key, re.sub(r"^blocks\.", "transformer.h.", key), re.sub(r"^head\.", "lm_head.", key)}
        names |= {key.replace("tok_emb", "transformer.wte").replace("pos_emb", "transformer.wpe")}
        names |= {f"transformer.{key}", f"model.{key}"}
        return any(f"'{name}'" in message for name in names)


def filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of the code base's own model with these numbers, in float64."""
    made = copy.deepcopy(model)
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        try:
            owner = made.get_submodule(path)
        except AttributeError:
            continue
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
    return made.double().eval()


def double(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def torch_file(name: str, around: Callable[[dict[str, Tensor]], Any] = dict) -> Callable[..., Path]:
    def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        torch.save(around(dict(tensors)), folder / name)
        return folder / name

    return write


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def agents() -> Iterator[Format]:
    """State dicts of decision transformers, each with the code base's own computation."""

    def of(module: Any, model: Any, name: str, adapter: str, unused: str, marks: set[str], **more: Any) -> Format:
        batch = double(module.batch_of(model))

        def mine(lens: Any) -> Tensor:
            made: Tensor = module.lensed(copy.deepcopy(lens).double(), batch)
            return made

        def theirs(_: Path, tensors: Mapping[str, Tensor]) -> Tensor:
            made: Tensor = module.original(filled(model, tensors), batch)
            return made

        return Format(
            name,
            adapter,
            cloned(model.state_dict()),
            mine=mine,
            theirs=theirs,
            unused=unused,
            marks=frozenset(marks),
            zipped=True,
            **more,
        )

    marks = {"embed_rtg.weight", "transformer.0.attention.q_net.weight", "predict_action.0.weight"}
    yield of(
        min_dt, min_dt.make(), "min-DT", "min_decision_transformer", MASKS["min_dt"], marks,
        write=torch_file("a.pt"), given={"n_heads": 2},
    )  # fmt: skip
    marks = {"return_emb.weight", "blocks.0.attention.in_proj_weight", "action_head.0.weight"}
    mean, std = torch.zeros(1, 5).numpy(), torch.ones(1, 5).numpy()
    yield of(
        corl, corl.make(), "CORL", "corl", MASKS["corl"], marks, given={"n_heads": 2},
        write=torch_file("a.pt", lambda t: {"model_state": t, "state_mean": mean, "state_std": std}),
    )  # fmt: skip
    marks = {"_rtg_embed.weight", "_gpt2._transformer.0._attention._q.weight", "_output.weight"}
    for discrete in (False, True):
        model = d3rlpy.make(discrete)
        act = "gelu" if discrete else "relu"
        yield of(
            d3rlpy, model, f"d3rlpy {'discrete' if discrete else 'continuous'} .pt", "d3rlpy", MASKS["d3rlpy"], marks,
            write=torch_file("a.pt", lambda t: {"transformer": t, "optim": {"state": {}}}),
            given={"n_heads": 2, "act_fn": act, "encoder_act": act, "encoder_last_act": "relu"},
        )  # fmt: skip
        yield of(
            d3rlpy, model, f"d3rlpy {'discrete' if discrete else 'continuous'} .d3", "d3rlpy", MASKS["d3rlpy"], marks,
            write=d3_file(model, act),
        )  # fmt: skip
    marks = {"ret_emb.0.weight", "global_pos_emb", "blocks.0.attn.query.weight"}
    yield of(
        kzl_atari, kzl_atari.make(), "kzl Atari", "kzl_atari", MASKS["atari"], marks, write=torch_file("a.pth"),
        given={"n_heads": 2},
    )  # fmt: skip


def d3_file(model: Any, act: str) -> Callable[..., Path]:
    def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        file: Path = d3rlpy.whole_file(model, folder / "a.d3", act, d3rlpy.vector(act, "relu"))
        whole, buffer = pickle.loads(file.read_bytes()), io.BytesIO()
        torch.save({"transformer": dict(tensors), "optim": {"state": {}}}, buffer)
        file.write_bytes(pickle.dumps({**whole, "torch": buffer.getvalue()}))
        return file

    return write


def minigrids() -> Iterator[Format]:
    torch.manual_seed(3)
    images, returns = torch.randn(3, 4, 3, 3, 3).double(), torch.randn(3, 4, 1).double()
    ids, times = torch.randint(3, (3, 4)), torch.randint(15, (3, 4))

    def mine(lens: Any) -> Tensor:
        with torch.no_grad():
            flat = images.permute(0, 1, 4, 2, 3).flatten(2)
            out = copy.deepcopy(lens).double()(flat, ids[:, :3], returns, times)
        made: Tensor = out.action_preds
        return made

    for name, gated, normed in (("MiniGrid", False, True), ("MiniGrid bare", True, False)):
        model = minigrid.agent(gated, normed)

        def theirs(_: Path, tensors: Mapping[str, Tensor], model: Any = model) -> Tensor:
            with torch.no_grad():
                out = filled(model, tensors)(images, ids[:, :3, None], returns, times[..., None])
            return out[1]  # type: ignore[no-any-return]

        def save(folder: Path, tensors: Mapping[str, Tensor], model: Any = model) -> Path:
            world = {"env_id": "MiniGrid-Empty-5x5-v0", "one_hot_obs": False, "view_size": 3, "max_steps": 50}
            run = {"trajectory_path": "here.gz", "initial_rtg": ["0", "1"], "eval_max_time_steps": 70}
            file: Path = minigrid.save(
                model, folder / "a.pt", dict(tensors), environment_config=world, offline_config=run
            )
            return file

        yield Format(
            name,
            "minigrid_decision_transformer",
            cloned(model.state_dict()),
            torch_file("a.pt") if gated else save,
            mine,
            theirs,
            {"act_fn": "relu"} if gated else {},
            unused=MASKS["minigrid"],
            marks=frozenset(
                {
                    "action_embedding.0.weight",
                    "time_embedding.weight",
                    "reward_embedding.0.weight",
                    "transformer.pos_embed.W_pos",
                }
            ),
            zipped=True,
        )


def hugging_face(make_hf: Any, make_batch: Any) -> Iterator[Format]:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    hf = make_hf(n_positions=7)
    facts = {"context": 4, "environment": "Hopper-v5", "state_mean": [0.0] * 5, "state_std": [1.0] * 5}
    batch = double(make_batch(hf.config, padding="left"))
    real = batch["attention_mask"].bool()
    beside = {**hf.config.to_dict(), "architectures": ["DecisionTransformerModel"]}

    def outputs(model: Any) -> Tensor:
        with torch.no_grad():
            out = model(**batch)
        return torch.cat([out.state_preds, out.action_preds, out.return_preds], -1)[real]

    def mine(lens: Any) -> Tensor:
        return outputs(copy.deepcopy(lens).double())

    def folder_of(weights: str) -> Callable[..., Path]:
        def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
            (folder / "config.json").write_text(json.dumps(beside))
            (folder / "dt_lens.json").write_text(json.dumps(facts))
            if weights.endswith("safetensors"):
                save_file({k: v.contiguous() for k, v in tensors.items()}, folder / weights)
            else:
                torch.save(dict(tensors), folder / weights)
            return folder

        return write

    def theirs(path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
        config = json.loads((path / "config.json").read_text())
        model = DecisionTransformerModel(DecisionTransformerConfig(**config))
        used = {key: t for key, t in tensors.items() if not re.fullmatch(MASKS["hf"], key)}
        used["encoder.wte.weight"] = model.state_dict()["encoder.wte.weight"]
        model.load_state_dict(used, strict=True)
        return outputs(model.double().eval())

    marks = frozenset({"embed_return.weight", "encoder.h.0.attn.c_attn.weight"})
    for name, weights in (("Hugging Face DT", "model.safetensors"), ("Hugging Face DT .bin", "pytorch_model.bin")):
        yield Format(
            name, "hf_decision_transformer", cloned(hf.state_dict()), folder_of(weights), mine, theirs,
            unused=MASKS["hf"], marks=marks, zipped=weights.endswith("bin"),
        )  # fmt: skip

    old = make_hf(**kzl.OPTIONS)
    old.encoder.wpe.weight.data.zero_()

    def kzls(_: Path, tensors: Mapping[str, Tensor]) -> Tensor:
        return outputs(filled(old, {re.sub(r"^transformer\.", "encoder.", k): t for k, t in tensors.items()}))

    tensors = cloned({k: t for k, t in kzl.renamed(old).items() if "wte" not in k})
    marks = frozenset({"embed_return.weight", "transformer.h.0.attn.c_attn.weight", "predict_action.0.weight"})
    yield Format(
        "kzl", "kzl", tensors, torch_file("a.pt", lambda t: {"model_state_dict": t}), mine, kzls, {"n_heads": 2},
        unused=MASKS["kzl"], marks=marks, zipped=True,
    )  # fmt: skip


def sharded(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], parts: int) -> Path:
    """A folder in Hugging Face's form, in one file or in several and their index."""
    (folder / "config.json").write_text(json.dumps(config))
    keys = sorted(tensors)
    if parts == 1:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        held = {key: tensors[key].contiguous() for key in keys[part::parts]}
        save_file(held, folder / name, {"format": "pt"})
        index |= dict.fromkeys(held, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def language_models(make_lm: Any) -> Iterator[Format]:
    import transformers

    def mine(lens: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = lens(TOKENS).float()
        return logits

    def theirs(path: Path, _: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
            made: Tensor = model.eval()(TOKENS).logits.float()
        return made

    for kind, parts in (
        ("gpt2", 1),
        ("gptj", 1),
        ("gpt_neo", 3),
        ("llama", 3),
        ("olmo2", 2),
        ("gemma2", 1),
        ("qwen3", 1),
    ):
        model = make_lm(kind)
        tied = model.config.tie_word_embeddings
        tensors = cloned({k: t for k, t in model.state_dict().items() if not (tied and k == "lm_head.weight")})
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}

        def write(folder: Path, tensors: Mapping[str, Tensor], config: Any = config, parts: int = parts) -> Path:
            return sharded(folder, tensors, config, parts)

        embed = "model.embed_tokens.weight" if "model.norm.weight" in tensors else "transformer.wte.weight"
        yield Format(
            f"{kind} in {parts}" if parts > 1 else kind, kind, tensors, write, mine, theirs,
            marks=frozenset({embed}), opens=True,
        )  # fmt: skip
    gpt = make_lm("gpt2", activation_function="gelu")

    def nanos(_: Path, tensors: Mapping[str, Tensor]) -> Tensor:
        renamed = {}
        for key, tensor in tensors.items():
            name = re.sub(r"^blocks\.", "transformer.h.", key).replace("tok_emb", "transformer.wte")
            name = re.sub(r"^ln_f", "transformer.ln_f", name.replace("pos_emb", "transformer.wpe"))
            name = re.sub(r"^head\.", "lm_head.", name)
            renamed[name] = tensor.T if ".c_" in key and key.endswith("weight") else tensor
        made = make_lm("gpt2", activation_function="gelu", tie_word_embeddings=False)
        renamed.setdefault("lm_head.weight", renamed["transformer.wte.weight"])
        made.load_state_dict(renamed, strict=True)
        return mine(lambda tokens: made(tokens).logits)

    letters = {chr(97 + i) if i < 26 else str(i): i for i in range(29)}
    for spelling, name in (("transformer", "nanoGPT"), ("blocks", "char-GPT")):
        beside = {"model_args": {"n_head": 4}} if spelling == "transformer" else {"stoi": letters, "config": {}}
        marks = {"transformer": ("transformer.wte", "transformer.wpe", "transformer.h.0.attn.c_attn")}
        marks["blocks"] = ("tok_emb", "pos_emb", "blocks.0.attn.c_attn")
        yield Format(
            name, "nano_gpt", cloned(nano_gpt.as_nano(gpt, spelling)),
            torch_file("ckpt.pt", lambda t, beside=beside: {"model": t, **beside}),  # type: ignore[misc]
            mine, nanos, {"n_heads": 4} if spelling == "blocks" else {},
            marks=frozenset(f"{key}.weight" for key in marks[spelling]), zipped=True,
        )  # fmt: skip


NAMES = (
    "Hugging Face DT", "Hugging Face DT .bin", "kzl", "min-DT", "CORL", "d3rlpy continuous .pt",
    "d3rlpy continuous .d3", "d3rlpy discrete .pt", "d3rlpy discrete .d3", "kzl Atari", "MiniGrid", "MiniGrid bare",
    "gpt2", "gptj", "gpt_neo in 3", "llama in 3", "olmo2 in 2", "gemma2", "qwen3", "nanoGPT", "char-GPT",
)  # fmt: skip
FOLDERS = tuple(name for name in NAMES if name[0].islower() and name.partition(" ")[0] in (
    "gpt2", "gptj", "gpt_neo", "llama", "olmo2", "gemma2", "qwen3"))  # fmt: skip


def every_format(make_hf: Any, make_batch: Any, make_lm: Any) -> dict[str, Format]:
    """All of them by name, in the order of ``NAMES``."""
    found = [*hugging_face(make_hf, make_batch), *agents(), *minigrids(), *language_models(make_lm)]
    assert sorted(one.name for one in found) == sorted(NAMES)
    return {one.name: one for one in found}
