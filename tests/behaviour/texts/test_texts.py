"""``evaluate`` on texts: losses and KL against Hugging Face's own, windows, pairing, and edits suspended meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import dt_lens
from dt_lens import DtLensError, SingularEdit, evaluate
from dt_lens.behaviour.texts.evaluation import TextEvaluation
from dt_lens.behaviour.texts.windows import cut, read_texts
from dt_lens.edits.edit import suspended
from dt_lens.lens.weights import weight_bytes

TEXT = "Of the making of many books there is no end, and much study is a weariness of the flesh. " * 2
W_IN = "blocks.0.mlp.W_in"


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token_id: int | None = None

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        special = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return special + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


def hf_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 260}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture
def theirs() -> Any:
    return hf_model()


@pytest.fixture
def lens(theirs: Any) -> Any:
    return dt_lens.wrap(theirs, tokenizer=Bytes())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(text: str, context: int) -> list[torch.Tensor]:
    tokens = torch.tensor(list(text.encode()))
    return list(tokens[: len(tokens) // context * context].view(-1, context))


def loss_of(model: Any, row: torch.Tensor) -> float:
    """Hugging Face's own sum rounds to float32 first."""
    with torch.no_grad():
        out = model(input_ids=row[None], labels=row[None])
    loss = float(F.cross_entropy(out.logits[0, :-1], row[1:]))
    assert loss == pytest.approx(float(out.loss), rel=1e-6)
    return loss


def every_bit(model: Any) -> dict[str, bytes]:
    return {name: weight_bytes(weight) for name, weight in model.weights.items()}


def test_losses_are_hugging_faces_own(lens: Any, theirs: Any) -> None:
    found = evaluate(lens, [TEXT, "tiny"], context=20)
    windows = [*ids(TEXT, 20), torch.tensor(list(b"tiny"))]
    wanted = [loss_of(theirs, row) for row in windows]
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-12)
    assert found.tokens.tolist() == [19] * (len(windows) - 1) + [3]
    assert found.mean == pytest.approx(np.mean(wanted)) and found.perplexity == pytest.approx(np.exp(np.mean(wanted)))
    assert found.bytes_per_token == 1 and found.bits_per_byte == pytest.approx(np.mean(wanted) / np.log(2))
    frame = found.to_frame()
    assert list(frame.columns) == ["index", "tokens", "loss", "kl"] and frame["index"].tolist() == list(
        range(len(found))
    )


def test_without_edits_nothing_diverges_or_moves(lens: Any) -> None:
    found = evaluate(lens, TEXT)
    assert (found.kl == 0).all() and found.moved == () and found.edits == ()
    assert found.model_id == found.base_id and found.context == 24


def test_kl_and_moves_are_those_computed_directly(lens: Any, theirs: Any) -> None:
    bare = copy.deepcopy(theirs)
    with SingularEdit(lens, W_IN, [0, 1], value="random", seed=3) as edit:
        found = evaluate(lens, TEXT, context=20)
        edited = copy.deepcopy(theirs)
        assert edit.active
    batch = torch.stack(ids(TEXT, 20))
    with torch.no_grad():
        log_q, log_p = (model(batch).logits[:, :-1].log_softmax(-1) for model in (bare, edited))
    wanted = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # KL(q || p)
    np.testing.assert_allclose(found.kl, wanted.mean(1), rtol=1e-9)
    assert found.kl.min() > 1e-4
    backwards = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(1)
    assert not np.allclose(found.kl, backwards, rtol=1e-3)
    np.testing.assert_allclose(found.loss, [loss_of(edited, row) for row in batch], rtol=1e-12)

    change = (log_p.exp() - log_q.exp()).mean((0, 1))
    table = found.moved_frame(3)
    assert table["token"].tolist() == [*change.argsort(descending=True)[:3].tolist(), *change.argsort()[:3].tolist()]
    for row in table.itertuples():
        assert row.change == pytest.approx(float(change[row.token]), rel=1e-9)
        assert row.before == pytest.approx(float(log_q.exp().mean((0, 1))[row.token]), rel=1e-9)
        assert row.after - row.before == pytest.approx(row.change)
    letter = next(row for row in found.moved if 33 <= row.token < 127)
    assert letter.text == chr(letter.token)


def test_edits_that_zero_every_write(lens: Any, theirs: Any) -> None:
    """With every matrix that writes to the stream at zero, the blocks add only their biases."""
    empty = copy.deepcopy(theirs)
    with torch.no_grad():
        for block in empty.transformer.h:
            block.mlp.c_proj.weight.zero_()
            block.attn.c_proj.weight.zero_()
    names = [f"blocks.{l}.mlp.W_out" for l in range(2)]
    edits = [SingularEdit(lens, name, slice(None), value=0.0) for name in names]
    edits += [
        SingularEdit(lens, f"blocks.{l}.attn.W_O", slice(None), value=0.0, head=h) for l in (0, 1) for h in (0, 1)
    ]
    baseline = evaluate(lens, TEXT, context=20)
    before = every_bit(lens)
    for edit in edits:
        edit.apply()
    found = evaluate(lens, TEXT, context=20)
    for edit in edits:
        edit.undo()
    assert every_bit(lens) == before
    batch = torch.stack(ids(TEXT, 20))
    wanted = [loss_of(empty, row) for row in batch]
    with torch.no_grad():
        log_q, log_p = (model(batch).logits[:, :-1].log_softmax(-1) for model in (theirs, empty))
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-8)
    np.testing.assert_allclose(found.kl, (log_q.exp() * (log_q - log_p)).sum(-1).mean(1), rtol=1e-7)
    compared = found.compare(baseline)
    assert compared.difference == pytest.approx(np.mean(wanted) - baseline.mean, rel=1e-7)


def test_a_window_has_the_same_bits_whatever_comes_with_it(theirs: Any) -> None:
    lens = dt_lens.wrap(theirs.float(), tokenizer=Bytes())
    with SingularEdit(lens, W_IN, 0):
        whole = evaluate(lens, [TEXT, TEXT[3:]], context=16)
        first = evaluate(lens, TEXT, context=16, windows=4)
        torch.set_num_threads(2)
        alone = [evaluate(lens, TEXT[16 * i : 16 * i + 16], context=16) for i in range(4)]
    assert torch.get_num_threads() == 2
    assert len(first) == 4
    for i in range(4):
        assert whole.loss[i] == first.loss[i] == alone[i].loss[0]
        assert whole.kl[i] == first.kl[i] == alone[i].kl[0] > 0


def test_edits_are_read_one_after_another(lens: Any) -> None:
    counts: list[tuple[float, int]] = []
    edit = SingularEdit(lens, W_IN, 0)
    options: dict[str, Any] = {"texts": TEXT, "context": 8, "windows": 3}
    edited, base = evaluate(lens, edits=[edit, None], progress=lambda *seen: counts.append(seen), **options)
    with edit:
        again = evaluate(lens, **options)
    assert str(edited.to_frame()) == str(again.to_frame()) and edited.model_id == again.model_id != base.model_id
    assert base.edits == () and not np.array_equal(base.outcomes, edited.outcomes)
    assert counts[-1] == (6, 6) and counts == sorted(counts)


def test_few_windows_at_a_time_make_no_difference(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with SingularEdit(lens, W_IN, 0):
        at_once = evaluate(lens, TEXT, context=16)
        monkeypatch.setattr("dt_lens.behaviour.texts.reading.AT_ONCE", 1)
        one_by_one = evaluate(lens, TEXT, context=16)
    assert at_once.to_dict() == one_by_one.to_dict()


def test_a_token_before_every_text_stands_before_every_window(lens: Any, theirs: Any) -> None:
    lens.tokenizer = Bytes()
    lens.tokenizer.bos_token_id = 255
    found = evaluate(lens, TEXT, context=20)
    rows = [torch.cat([torch.tensor([255]), row]) for row in ids(TEXT, 19)]
    wanted = [loss_of(theirs, row) for row in rows]
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-12)
    assert set(found.tokens) == {19}


def test_edited_against_unedited(lens: Any) -> None:
    baseline = evaluate(lens, TEXT, context=16)
    edit = SingularEdit(lens, W_IN, 0)
    with edit:
        edited = evaluate(lens, TEXT, context=16)
    with edit.control(1):
        control = evaluate(lens, TEXT, context=16)
    assert edited.base_id == control.base_id == baseline.model_id
    assert len({edited.model_id, control.model_id, baseline.model_id}) == 3
    assert edited.edits[0]["matrix"] == W_IN and control.edits[0]["kind"] != edited.edits[0]["kind"]
    c = edited.compare(baseline)
    d = edited.loss - baseline.loss
    assert c.difference == pytest.approx(d.mean()) and c.perplexity_ratio == pytest.approx(np.exp(d.mean()))
    assert c.difference_interval.low < c.difference < c.difference_interval.high
    assert c.perplexity_ratio_interval == pytest.approx(np.exp(c.difference_interval))
    assert c.kl == pytest.approx(edited.kl.mean()) and c.kl_interval.low > 0
    assert c.to_dict() == edited.compare(baseline).to_dict() and c.moved == edited.moved
    assert c.to_frame()["difference"].tolist() == d.tolist()
    for shown in (str(c), repr(c), c._repr_html_(), str(edited), repr(edited), edited._repr_html_()):
        assert "16 tokens" in shown
    assert "KL" in str(c) and "probability up" in str(c) and "KL" not in str(baseline)
    same = baseline.compare(evaluate(lens, TEXT, context=16))
    assert same.difference == 0 and same.p_value == 1 and same.perplexity_ratio == 1 and same.effect_size == 0


def test_a_record_comes_back_to_the_last_bit(lens: Any) -> None:
    import json

    with SingularEdit(lens, W_IN, 0):
        found = evaluate(lens, TEXT, context=16)
    back = TextEvaluation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert back.to_dict() == found.to_dict() and back.moved == found.moved
    assert back.compare(found).difference == 0
    with pytest.raises(DtLensError, match="per_window"):
        TextEvaluation.from_dict({k: v for k, v in found.to_dict().items() if k != "per_window"})


def test_evaluations_that_cannot_be_paired_are_refused(lens: Any) -> None:
    found = evaluate(lens, TEXT, context=16)
    for other, words in (
        (evaluate(lens, TEXT.upper(), context=16), "differ in their text"),
        (evaluate(lens, TEXT, context=8), "differ in their context"),
        (evaluate(lens, TEXT, context=16, windows=2), "different windows"),
        (evaluate(dt_lens.wrap(hf_model(1), tokenizer=Bytes()), TEXT, context=16), "different models"),
        ("baseline", "another evaluation"),
    ):
        with pytest.raises(DtLensError, match=words):
            found.compare(other)
    tuned = evaluate(dt_lens.wrap(hf_model(1), tokenizer=Bytes()), TEXT, context=16)
    assert tuned.compare(found, other_model=True).difference == pytest.approx(tuned.mean - found.mean)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": TEXT, "context": 25}, "no more than 24"),
        ({"texts": TEXT, "context": 1}, "context is 1"),
        ({"texts": TEXT, "windows": 0}, "windows is 0"),
        ({"texts": "x"}, "two tokens"),
        ({"texts": []}, "empty"),
        ({"texts": 3}, "int"),
        ({"texts": "nowhere/text.txt"}, "no text file"),
        ({"texts": Path("nowhere.txt")}, "There is no text file 'nowhere.txt'; check"),
        ({}, "heldout.txt"),
        ({"texts": TEXT, "episodes": 3}, "language model"),
        ({"texts": TEXT, "target_return": 3.0}, "language model"),
    ],
)
def test_bad_arguments_are_one_sentence(lens: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DtLensError, match=words):
        evaluate(lens, **arguments)


def test_models_that_cannot_read_texts_are_refused(lens: Any, theirs: Any, make_dt: Any) -> None:
    with pytest.raises(DtLensError, match="no tokenizer"):
        evaluate(dt_lens.wrap(theirs), TEXT)
    with pytest.raises(DtLensError, match="agent"):
        evaluate(make_dt(0), "Hopper-v5", texts=TEXT)
    with torch.no_grad():
        theirs.transformer.wte.weight[ord("m")] = float("inf")
    with pytest.raises(DtLensError, match="NaN or infinite"):
        evaluate(lens, TEXT)


def test_texts_come_as_files_strings_and_lists(lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding="utf-8")
    found = [evaluate(lens, texts) for texts in (file, str(file), TEXT, [TEXT], [file])]
    assert len({e.text_id for e in found}) == 1
    assert [e.text for e in found[:3]] == ["a.txt", "a.txt", f"a text of {len(TEXT)} characters"]
    monkeypatch.chdir(tmp_path)
    assert read_texts(["a.txt"]) == ["a.txt"] and read_texts("a.txt") == [TEXT]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DtLensError, match="UTF-8"):
        read_texts(file)


def test_the_held_out_text_is_in_the_models_folder(lens: Any, tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text(TEXT, encoding="utf-8")
    lens.tokenizer = Bytes()
    lens.tokenizer.name_or_path = str(tmp_path)
    assert evaluate(lens).text_id == evaluate(lens, TEXT).text_id


def test_a_tokenizer_that_only_encodes_and_decodes_will_do() -> None:
    class Plain:
        bos_token_id = 255

        def encode(self, text: str) -> list[int]:
            return [255, *text.encode()]

    with_start = cut([TEXT], Plain(), 20)
    marked = Bytes()
    marked.bos_token_id = 255
    assert with_start.text_id == cut([TEXT], marked, 20).text_id
    assert bytes(with_start.tokens[1].tolist()) == b"\xff" + TEXT[19:38].encode()


def test_windows_do_not_overlap_and_leave_out_only_the_end() -> None:
    windows = cut([TEXT, "ab", "c"], Bytes(), 16)
    assert b"".join(bytes(w.tolist()) for w in windows.tokens[:-1]) == TEXT.encode()[: len(TEXT) // 16 * 16]
    assert bytes(windows.tokens[-1].tolist()) == b"ab" and windows.unpredicted == 1
    assert windows.bytes_per_token == 1
    assert len({w.text_id for w in (windows, cut([TEXT, "ab"], Bytes(), 8), cut([TEXT + "x" * 16], Bytes(), 16))}) == 3


def test_progress_counts_windows_and_an_interruption_leaves_the_edit_in_force(lens: Any) -> None:
    seen: list[tuple[float, int]] = []
    before = every_bit(lens)
    with SingularEdit(lens, W_IN, 0) as edit:
        during = every_bit(lens)
        evaluate(lens, TEXT, context=16, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(i + 1.0, len(seen)) for i in range(len(TEXT) // 16)]

        def stop(done: float, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(lens, TEXT, context=16, progress=stop)
        assert every_bit(lens) == during and edit.active
    assert every_bit(lens) == before
    evaluate(lens, TEXT, progress=True)


def test_dropout_is_off_and_the_modes_come_back(theirs: Any) -> None:
    theirs.transformer.drop.p = 0.5
    lens = dt_lens.wrap(theirs, tokenizer=Bytes())
    plain = evaluate(lens, TEXT)
    lens.train()
    theirs.train()
    assert (evaluate(lens, TEXT).loss == plain.loss).all()
    assert theirs.transformer.drop.training and lens.training


def test_the_command_line_reads_with_a_language_model(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dt_lens.cli.app import app

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", "tiny-gpt2", *arguments])

    out = tmp_path / "windows.csv"
    done = run("--windows", "6", "--edit", W_IN, "--sv", "0", "--out", str(out))
    assert done.exit_code == 0, done.exception
    assert "heldout.txt: 6 windows" in done.output and "KL from the unedited" in done.output
    assert out.read_text().startswith("arm,index,tokens,loss,kl") and len(out.read_text().splitlines()) == 13
    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    assert "own.txt: 1 window" in run("--text", str(text)).output
    for arguments, words in (
        (["--env", "Hopper-v5", "--episodes", "3"], "which reads --text; leave out --environment and --episodes."),
        (["--workers", "2"], "leave out --workers."),
        (["--text", str(tmp_path / "none.txt")], "There is no text file"),
    ):
        failed = run(*arguments)
        assert isinstance(failed.exception, DtLensError), arguments
        assert words in str(failed.exception)
    agent = CliRunner().invoke(app, ["evaluate", "hopper", "--text", str(text), "--windows", "2"])
    assert "runs in an environment; leave out --text and --windows." in str(agent.exception)


class TestSuspended:
    def test_the_edits_are_gone_inside_and_back_afterwards(self, lens: Any) -> None:
        before = every_bit(lens)
        edits = [SingularEdit(lens, W_IN, i, value="flip") for i in (0, 1)] + [SingularEdit(lens, "blocks.1.mlp.W_out")]
        with edits[0], edits[1], edits[2]:
            during = every_bit(lens)
            with suspended(lens):
                assert every_bit(lens) == before and len(lens.active_edits) == 3
                with suspended(lens):
                    assert every_bit(lens) == before
                assert every_bit(lens) == before
            assert every_bit(lens) == during != before
        assert every_bit(lens) == before

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_they_come_back_whatever_happens(self, lens: Any, error: type[BaseException]) -> None:
        with SingularEdit(lens, W_IN, 0):
            during = every_bit(lens)
            with pytest.raises(error), suspended(lens):
                raise error
            assert every_bit(lens) == during

    def test_an_edit_that_ends_inside_stays_ended(self, lens: Any) -> None:
        before = every_bit(lens)
        first, second = SingularEdit(lens, W_IN, 0), SingularEdit(lens, W_IN, 1)
        second.apply()
        only_second = every_bit(lens)
        first.apply()
        with suspended(lens):
            first.undo()
        assert every_bit(lens) == only_second
        second.undo()
        assert every_bit(lens) == before

    def test_without_edits_it_does_nothing(self, lens: Any) -> None:
        before = every_bit(lens)
        with suspended(lens):
            assert every_bit(lens) == before
        assert every_bit(lens) == before

    def test_a_weight_that_was_cast_meanwhile_is_refused(self, lens: Any, theirs: Any) -> None:
        with pytest.raises(DtLensError), SingularEdit(lens, W_IN, 0), suspended(lens):
            theirs.half()
