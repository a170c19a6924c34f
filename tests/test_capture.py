"""From documents to a trace: drops, losses, parts, text, threads, every named error. What is routed: test_families.py."""

import errno
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import layout
from analysis.capture import CaptureCancelled, CaptureError, PromptTooLong, capture, capture_parts, plan_documents, plan_parts, recording
from analysis.routers import find_sites
from analysis.store import RunError, read_manifest
from analysis.tokens import Pieces
from analysis.trace import NO_EXPERT
from analysis.verifying import verify_run
from analysis.writing import RunWriter

from . import tiny
from .synthetic import differences

TEXTS = ["def f(x): return x", "Il pleut.", "选择文件 🎉 now and then"]
TOKENIZER = tiny.tokenizer()


def test_switch_drops_are_recorded_as_dropped() -> None:
    model = tiny.build("switch_transformers")
    trace = capture(model, TOKENIZER, ["aaaaaaaaaaaa", "abababab"])
    experts, chosen = trace.experts(0), trace.chosen(0)
    for start, stop in ((0, 12), (12, 20)):  # capacity counts per sequence, in order
        place: dict[int, int] = {}
        for row in range(start, stop):
            e = int(chosen[row, 0])
            place[e] = place.get(e, 0) + 1
            assert experts[row, 0] == (e if place[e] <= 3 else NO_EXPERT)
    assert (experts == NO_EXPERT).any() and trace.stats.dropped(0) == (experts == NO_EXPERT).sum()
    assert set(trace.tokens["stack"].to_pylist()) == {"encoder", "decoder"}
    assert trace.n_tokens("decoder") == 2


def test_loss_and_scores_against_the_logits() -> None:
    model = tiny.build("olmoe")
    trace = capture(model, TOKENIZER, TEXTS, probabilities=True)
    start, stop = trace.document_range(1)
    ids = torch.tensor([trace.tokens["token_id"].to_pylist()[start:stop]])
    with torch.no_grad():
        out = model(input_ids=ids, output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
    loss = trace.tokens["loss"].to_pylist()[start:stop]
    assert loss[-1] is None
    np.testing.assert_allclose(loss[:-1], expected.numpy(), rtol=1e-4)
    for layer in trace.layers:
        p = out.router_logits[layer.index].softmax(-1)
        scores = trace.scores(layer.index, start, stop)
        np.testing.assert_allclose(scores.entropy, -(p * p.log()).sum(-1).numpy(), rtol=1e-4)
        ordered = p.sort(-1, descending=True).values
        np.testing.assert_allclose(scores.margin, (ordered[:, 2] - ordered[:, 3]).numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(scores.logsumexp, out.router_logits[layer.index].logsumexp(-1).numpy(), rtol=1e-4)
        np.testing.assert_allclose(scores.probabilities, p.numpy(), atol=1e-5)
        whole = trace.scores(layer.index).probabilities
        np.testing.assert_allclose(trace.stats.probability_sum(layer.index), whole.sum(0), rtol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_predicted_ids_are_the_largest_logits(family: str) -> None:
    model = tiny.build(family)
    trace = capture(model, TOKENIZER, TEXTS, batch_size=2)
    rows = trace.stream_tokens("decoder").to_pandas()
    for i, text in enumerate(TEXTS):
        ids = torch.tensor(TOKENIZER([text])["input_ids"])
        given = {"input_ids": ids}
        if family == "switch_transformers":
            given["decoder_input_ids"] = torch.full((1, 1), model.config.decoder_start_token_id or 0)
        with torch.no_grad():
            logits = model(**given).logits[0]
        assert rows[rows.document == i].predicted.tolist() == logits.argmax(-1).tolist()
    if family == "switch_transformers":
        assert trace.stream_tokens("encoder")["predicted"].null_count == len(trace.stream_tokens("encoder"))


def test_predicted_ids_of_a_generation_begin_at_its_first_new_token() -> None:
    model = tiny.build("olmoe")
    model.generation_config.suppress_tokens = list(range(200))  # generate picks other tokens than the largest logit
    trace = capture(model, TOKENIZER, TEXTS[:2], new_tokens=6)
    for i in range(2):
        start, stop = trace.document_range(i)
        rows = trace.tokens.slice(start, stop - start).to_pandas()
        with torch.no_grad():
            expected = model(torch.tensor([rows.token_id.tolist()])).logits[0].argmax(-1).tolist()
        prompt = (rows.phase == "prefill").sum()
        assert rows.predicted[: prompt - 1].isna().all() and rows.predicted[prompt - 1 :].tolist() == expected[prompt - 1 :]
        assert rows.token_id[prompt:].tolist() != expected[prompt - 1 : -1]


def test_parts_do_not_change_the_result() -> None:
    model = tiny.build("mixtral")
    texts = [f"text number {i} " * (1 + i % 4) for i in range(12)]
    whole = capture(model, TOKENIZER, texts, labels=["x", "y"] * 6, batch_size=1)
    pieces = capture(model, TOKENIZER, (t for t in texts), labels=["x", "y"] * 6, batch_size=1, part_tokens=60)
    assert differences(whole, pieces) == []
    assert len(list(capture_parts(model, TOKENIZER, texts, part_tokens=60))) > 3


def test_token_text_and_bytes_are_exact() -> None:
    pieces = Pieces.of(TOKENIZER)
    text = "a é选\n\t🎉\u202e"
    ids = TOKENIZER(text)["input_ids"]
    assert b"".join(pieces.exact(i)[1] or b"" for i in ids).decode() == text
    assert pieces.exact(ids[2]) == ("\\xc3", b"\xc3")
    assert pieces.exact(0) == ("<pad>", b"<pad>")


def test_eight_threads_on_one_model_get_their_own_data() -> None:
    model = tiny.build("olmoe")
    texts = ["x" * (3 + i) for i in range(8)]
    expected = [capture(model, TOKENIZER, [t]) for t in texts]
    wrong: list[str] = []

    def work(i: int) -> None:
        try:
            turns(i)
        except Exception as error:
            wrong.append(repr(error))

    def turns(i: int) -> None:
        for turn in range(50):
            if turn % 10 == 9:
                with pytest.raises(RuntimeError, match="stop"), recording(model):
                    raise RuntimeError("stop")
                continue
            trace = capture(model, TOKENIZER, [texts[i]])
            if differences(trace, expected[i]):
                wrong.append(f"{i}/{turn}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_named_errors() -> None:
    model = tiny.build("olmoe")
    with pytest.raises(CaptureError, match="empty"):
        capture(model, TOKENIZER, ["fine", ""])
    with pytest.raises(PromptTooLong, match="document 2 has 300 tokens, the limit is 256"):
        capture(model, TOKENIZER, ["fine", "x" * 300])
    with pytest.raises(CaptureError, match="differ in number"):
        capture(model, TOKENIZER, ["a", "b"], labels=["only one"])
    with pytest.raises(CaptureError, match="no documents"):
        capture(model, TOKENIZER, [])
    with pytest.raises(CaptureError, match="training mode"):
        capture(model.train(), TOKENIZER, ["a"])
    model.eval()
    with pytest.raises(CaptureCancelled):
        capture(model, TOKENIZER, ["a"], cancelled=lambda: True)


def test_a_site_that_does_not_fire_is_an_error() -> None:
    model = tiny.build("olmoe")
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: hidden
    with pytest.raises(CaptureError, match="layers.1.mlp routed 0 times"):
        capture(model, TOKENIZER, ["abc"])


def test_a_site_that_fires_twice_is_an_error() -> None:
    model = tiny.build("olmoe")
    block = model.model.layers[0].mlp
    once = block.forward
    block.forward = lambda hidden: once(hidden) + once(hidden)
    with pytest.raises(CaptureError, match="routed 2 times in 1"):
        capture(model, TOKENIZER, ["abc"])


def test_ids_changed_between_router_and_experts_are_an_error() -> None:
    model = tiny.build("olmoe")
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, a: (a[0], (a[1] + 1) % 8, a[2]))
    with pytest.raises(CaptureError, match="other ids than the router gave"):
        capture(model, TOKENIZER, ["abc"])


def test_progress_counts_everything() -> None:
    seen: list[Any] = []
    capture(tiny.build("mixtral"), TOKENIZER, TEXTS, batch_size=1, progress=seen.append)
    assert [p.documents for p in seen] == [1, 2, 3] and seen[-1].tokens == sum(len(x.encode()) for x in TEXTS)


def test_a_part_is_written_while_the_next_is_captured_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must get on while a part is written, and wait before a third part is in memory."""
    events: list[str] = []
    original = RunWriter.write
    captured = threading.Semaphore(0)

    def slow(writer: RunWriter, part: Any) -> None:
        assert part.index == 3 or captured.acquire(timeout=30), "the next part is not captured while this one is written"
        time.sleep(0.1)  # were captures not held back, more would start now
        original(writer, part)
        events.append(f"written {part.index}")

    def progress(p: Any) -> None:
        events.append(f"captured {p.documents - 1}")
        if p.documents > 1:
            captured.release()

    monkeypatch.setattr(RunWriter, "write", slow)
    trace = capture(tiny.build("olmoe"), TOKENIZER, ["aaaa"] * 4, out=tmp_path / "run", part_tokens=4, progress=progress)
    assert trace.n_tokens("decoder") == 16 and verify_run(tmp_path / "run") == ()
    for i in range(2):
        assert events.index(f"written {i}") < events.index(f"captured {i + 2}")


def test_what_the_writer_raises_is_raised_and_a_cancelled_capture_keeps_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny.build("olmoe"), list[Any]()
    options: dict[str, Any] = {"out": tmp_path / "run", "part_tokens": 4, "progress": seen.append}
    with pytest.raises(CaptureCancelled):
        capture(model, TOKENIZER, ["aaaa"] * 6, **options, cancelled=lambda: len(seen) == 3)
    # the fourth had started when the third was seen: it is not thrown away
    assert len(list((tmp_path / "run/progress").glob("part-*.json"))) == 4
    original = RunWriter.write

    def full(writer: RunWriter, part: Any) -> None:
        if part.index == 4:
            raise OSError(errno.ENOSPC, "No space left on device", "part-00004")
        original(writer, part)

    monkeypatch.setattr(RunWriter, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        capture(model, TOKENIZER, ["aaaa"] * 6, **options)
    assert caught.value.filename == "part-00004" and len(seen) <= 6
    monkeypatch.undo()
    assert capture(model, TOKENIZER, ["aaaa"] * 6, **options).n_tokens("decoder") == 24
    assert not [t for t in threading.enumerate() if t.name.startswith("routerscope-writer")]


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_planned_parts_captured_apart_are_those_of_one_capture(family: str) -> None:
    """What a cluster rests on: documents and rows of a part are known beforehand, and nothing else ties it to the others."""
    model, texts = tiny.build(family), [f"{i} " + "ab" * (i % 5 + 1) for i in range(9)]
    options: dict[str, Any] = {"part_tokens": 16, "batch_size": 2}
    whole = list(capture_parts(model, TOKENIZER, texts, **options))
    plan = plan_parts(plan_documents(model, TOKENIZER, texts[:4]) + plan_documents(model, TOKENIZER, texts[4:], first_document=4), 16)
    assert len(plan) == len(whole) > 3
    for planned, part in reversed(list(zip(plan, whole, strict=True))):
        mine = texts[planned.first_document : planned.first_document + len(planned.documents)]
        (again,) = capture_parts(model, TOKENIZER, mine, names=[d[2] for d in planned.documents], first_document=planned.first_document,
                                 first_part=planned.index, first_rows=planned.first_rows, **options)  # fmt: skip
        assert again.tokens.equals(part.tokens) and again.documents.equals(part.documents)
        assert (again.index, again.first_rows) == (part.index, part.first_rows)
        assert planned.rows == {s: len(part.stream_tokens(s)) for s in part.first_rows}
        assert all(np.array_equal(a.experts, b.experts) for a, b in zip(again.routing, part.routing, strict=True))
    with pytest.raises(PromptTooLong, match="document 2 has 3 tokens"):
        plan_documents(model, TOKENIZER, ["a", "abc"], max_tokens=2)


def test_a_capture_says_how_long_its_parts_are_and_is_resumed_with_the_same_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing given, the model decides; one begun by a program that did not say, or decided otherwise, is refused by name, never mixed."""
    model, seen = tiny.build("olmoe"), list[Any]()
    monkeypatch.setattr(layout, "GROUP_ROWS", 4)
    monkeypatch.setattr(layout, "PART_DECISIONS", 8 * sum(s.info.top_k for s in find_sites(model)))
    assert [len(p.tokens) for p in capture_parts(model, TOKENIZER, ["aaaa"] * 5)] == [8, 8, 4]
    given: dict[str, Any] = {"out": tmp_path / "run", "batch_size": 1, "progress": seen.append}
    with pytest.raises(CaptureCancelled):
        capture(model, TOKENIZER, ["aaaa"] * 5, **given, cancelled=lambda: len(seen) == 3)
    began = tmp_path / "run/progress/capture.json"
    said = began.read_text()
    began.write_text(said.replace('"part_tokens": 8', '"new_tokens": 0'))
    for part_tokens in (None, 4):
        with pytest.raises(RunError, match=r"other options \((new_tokens, )?part_tokens\): use the same"):
            capture(model, TOKENIZER, ["aaaa"] * 5, **given, part_tokens=part_tokens)
        began.write_text(said)
    trace = capture(model, TOKENIZER, ["aaaa"] * 5, **given)
    assert trace.options["part_tokens"] == 8 and [p["rows"]["decoder"] for p in read_manifest(tmp_path / "run")["parts"]] == [8, 8, 4]
    assert differences(capture(model, TOKENIZER, ["aaaa"] * 5, batch_size=1), trace) == []


def test_new_tokens_that_fill_the_context_leave_no_room_for_a_text() -> None:
    with pytest.raises(CaptureError, match="256 new tokens leave no room for a text: a document has at most 256 tokens"):
        capture(tiny.build("mixtral"), TOKENIZER, ["a"], new_tokens=256)
