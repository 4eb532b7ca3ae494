"""What all tests share: shapes checked at run time, small models, and other people's checkpoints where they are."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import install_import_hook, jaxtyped
from torch import nn

# Modules with shapes in their annotations, which are checked.
CHECKED = [
    "dt_lens.behaviour.agents.windows",
    "dt_lens.decision_transformer.model",
    "dt_lens.decision_transformer.policy",
    "dt_lens.edits.control",
    "dt_lens.edits.replacements",
    "dt_lens.edits.low_rank",
    "dt_lens.lens.embeddings",
    "dt_lens.lens.matrices",
    "dt_lens.svd.decomposition",
    "dt_lens.svd.solvers",
    "dt_lens.lens.activations",
    "dt_lens.lens.watching",
    "dt_lens.svd.side_labels",
    "dt_lens.svd.token_table",
    "dt_lens.training.agent",
]
CALLS = 20  # of each function, that are checked in a test
calls = Counter[str]()
SHAPED = re.compile(r"\b(Float|Int|Bool|Shaped|Num)\[")


# What decides whether a change may land answers the same each time; `make fuzz` looks in new places.
hypothesis.settings.register_profile("steady", derandomize=True, database=None)
hypothesis.settings.register_profile("random", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# A shell starts its background jobs with Ctrl-C ignored, and so would be every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that no process is left with one at the end.

    A test that takes more than a minute says how many: ``@pytest.mark.acceptance(minutes=3)``.
    """

    def minutes(item: pytest.Item) -> float:
        return max((mark.kwargs.get("minutes", 0) for mark in item.iter_markers("acceptance")), default=0)

    items.sort(key=minutes, reverse=True)


def shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations that tell shapes; mypy has checked the others."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if is_shape(hint)}
    return beartype(function)


def is_shape(hint: Any) -> bool:
    return bool(SHAPED.search(str(hint)))


def first_calls(found: Any = None, *, typechecker: Any = None) -> Any:
    """Stands for ``jaxtyping.jaxtyped``: checks the first calls of a function in each test.

    Checking every call took half of the time of all tests. Functions and classes without shapes stay as they are.
    """
    if found is None:
        return functools.partial(first_calls, typechecker=typechecker)
    if not any(map(is_shape, getattr(found, "__annotations__", {}).values())):
        return found
    checked = jaxtyped(found, typechecker=typechecker)
    if not inspect.isfunction(found):
        return checked
    name = f"{found.__module__}.{found.__qualname__}"

    @functools.wraps(found)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if calls[name] >= CALLS:
            return found(*args, **kwargs)
        calls[name] += 1
        return checked(*args, **kwargs)

    return wrapped


@pytest.fixture(autouse=True)
def count_anew() -> None:
    calls.clear()


# Before anything imports them: the hook rewrites modules as they are read, to call `jaxtyping.jaxtyped`.
jaxtyping.jaxtyped = first_calls  # type: ignore[assignment]
install_import_hook(CHECKED, f"{__name__}.shapes_only")


def spread(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Move every parameter away from where initialisation put it: zero biases and unit scales would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium as a Playwright ``Browser``: ``page = chromium.new_page(viewport=...)``.

    A test is skipped where Playwright or a browser is missing. The browser is Debian's, or the one that BROWSER_PATH
    names; Playwright's own is not downloaded.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium here; on Debian apt-get install chromium, or name one in BROWSER_PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., Any]:
    """A small random ``DecisionTransformerModel`` in evaluation mode: ``make_hf(seed=1, n_head=2)``."""
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    def make(seed: int = 0, size: float = 0.3, **options: Any) -> Any:
        torch.manual_seed(seed)
        sizes = {"state_dim": 5, "act_dim": 3, "hidden_size": 16, "n_layer": 2, "n_head": 2, "max_ep_len": 40}
        # There are no tokens, so no ids of any; the class warns about its own defaults.
        config = DecisionTransformerConfig(
            **{"n_positions": 30, "bos_token_id": None, "eos_token_id": None, **sizes, **options}
        )
        return spread(DecisionTransformerModel(config), size).eval()

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """A random batch for a model with ``state_dim``, ``act_dim`` and ``max_ep_len`` in its configuration."""

    def make(
        config: Any, batch: int = 3, steps: int = 4, padding: str = "none", seed: int = 0
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(batch, steps, dtype=torch.long)
        for row in range(batch):
            cut = row % steps  # the first window is whole, and no window is all padding
            if padding == "left":
                mask[row, :cut] = 0
            elif padding == "right":
                mask[row, steps - cut :] = 0
        made = {
            "states": torch.randn(batch, steps, config.state_dim, generator=generator),
            "actions": torch.randn(batch, steps, config.act_dim, generator=generator),
            "returns_to_go": torch.randn(batch, steps, 1, generator=generator),
            "timesteps": torch.randint(config.max_ep_len, (batch, steps), generator=generator),
        }
        return made if padding == "none" else {**made, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def real_checkpoints() -> Callable[[str], Path]:
    """Checkpoints that other people trained, by their path in a folder of such; a test is skipped where one is missing.

    The folder is the one that the environment variable DT_LENS_REAL_CHECKPOINTS names, or shared/real beside the
    repository.
    """
    named = os.environ.get("DT_LENS_REAL_CHECKPOINTS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "real"

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"{name} is not here; name a folder that holds it in DT_LENS_REAL_CHECKPOINTS")
        return folder / name

    return find


@pytest.fixture(scope="session")
def make_dt() -> Callable[..., Any]:
    """A random ``HookedDecisionTransformer`` in evaluation mode, no bias zero and no scale one: ``make_dt(1)``."""
    from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

    def make(seed: int = 0, size: float = 0.2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        torch.manual_seed(seed)
        sizes = {"state_dim": 5, "act_dim": 3, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 24, "n_ctx": 4}
        cfg = HookedDecisionTransformerConfig(**{"max_ep_len": 30, "act_fn": "gelu", **sizes, **options})
        return spread(HookedDecisionTransformer(cfg), size).eval().to(dtype)

    return make


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., Any]:
    """A small random causal language model of Hugging Face's class, in evaluation mode: ``make_lm("gptj", n_head=4)``.

    No bias is zero and no scale one. Names: bloom, gpt2, gptj, gpt_neo, gpt_neox, llama, mistral, opt, phi3, qwen2,
    qwen3, gemma2, gemma3, olmo2.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    ids = {"bos_token_id": None, "eos_token_id": None}
    decoder = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 12}
    llama = {**decoder, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = {**llama, "head_dim": 4, "query_pre_attn_scalar": 3, "sliding_window": 4, "pad_token_id": 0}
    neo = {"vocab_size": 29, "max_position_embeddings": 12, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
    gpt = {"vocab_size": 29, "n_positions": 12, "n_embd": 16, "n_layer": 2}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {**gpt, "n_head": 4}),
        "bloom": (
            transformers.BloomForCausalLM,
            transformers.BloomConfig,
            {"vocab_size": 29, "hidden_size": 16, "n_layer": 2, "n_head": 2, "seq_length": 12},
        ),
        "gptj": (transformers.GPTJForCausalLM, transformers.GPTJConfig, {**gpt, "n_head": 2, "rotary_dim": 4}),
        "gpt_neo": (
            transformers.GPTNeoForCausalLM,
            transformers.GPTNeoConfig,
            {**neo, "attention_types": [[["global", "local"], 1]], "window_size": 3},
        ),
        "gpt_neox": (
            transformers.GPTNeoXForCausalLM,
            transformers.GPTNeoXConfig,
            {**decoder, "num_attention_heads": 2, "intermediate_size": 24, "rotary_pct": 0.5},
        ),
        "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, gemma),
        "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, gemma),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, llama),
        "opt": (
            transformers.OPTForCausalLM,
            transformers.OPTConfig,
            {**decoder, "num_attention_heads": 4, "ffn_dim": 24},
        ),
        "olmo2": (transformers.Olmo2ForCausalLM, transformers.Olmo2Config, {**llama, "pad_token_id": 0}),
        "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, llama),
        "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, {**llama, "pad_token_id": 0}),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, llama),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {**llama, "head_dim": 4}),
    }

    def make(kind: str, seed: int = 0, size: float = 0.3, **options: Any) -> Any:
        torch.manual_seed(seed)
        model, config, sizes = kinds[kind]
        return spread(model(config(**{**ids, **sizes, **options})), size).eval()

    return make
