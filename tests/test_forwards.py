"""Off the device without waiting for it: what may wait, what overlaps, and in which order errors come."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from analysis import forwards, hostcopy
from analysis.assembling import Document
from analysis.capture import CaptureCancelled, CaptureError, PromptTooLong, _overlapped, capture, capture_parts
from analysis.hostcopy import HostCopy
from analysis.recorder import Recorder, recording
from analysis.routers import RouterError, find_sites
from analysis.store import open_run

from . import tiny
from .families import FAMILIES, Family
from .proofs import record, run
from .synthetic import differences
from .test_families import every

TOKENIZER = tiny.tokenizer()
BATCH = [Document(0, "a", None, [5, 6, 7]), Document(1, "b", None, [5, 6, 7, 8, 9])]
# Their own code asks the device for numbers (which experts were hit, how many tokens each got); their hooks are tested below.
OWN_CODE_WAITS = {"dbrx", "glm5_next", "jetmoe", "longcat_flash", "qwen4_exp", "step3p7", "switch_transformers"}
aten = torch.ops.aten
WAIT = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
}


class NoWaiting(TorchDispatchMode):
    """Fails on an operation whose result the host, or the shape of whose result the device, must tell: it waits on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        tensors = [x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, Tensor)]
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(x.dtype == torch.bool for x in tensors)
        counted = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        if packet in WAIT or by_mask or counted:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@every
def test_no_hook_waits_for_the_device(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for name in ("router_done", "experts_called"):
        plain = getattr(Recorder, name)

        def watched(recorder: Recorder, at: int, given: Any, plain: Any = plain) -> None:
            with NoWaiting(), pytest.MonkeyPatch.context() as patch:
                for read in ("tolist", "numpy", "cpu"):  # which on the CPU is no operation
                    patch.setattr(Tensor, read, lambda _: pytest.fail("a hook reads a tensor"))
                plain(recorder, at, given)
            calls.append(at)

        monkeypatch.setattr(Recorder, name, watched)
    model = family.build()
    with recording(model) as recorder:
        run(model)
    recorder.take()
    assert len(calls) == 2 * len(recorder.sites)


@every
def test_nothing_waits_from_the_inputs_to_the_copy(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no numbers: whatever would wait for one fails, in the hooks, after the forward, in the model itself."""
    if family.name in OWN_CODE_WAITS or family.name == "qwen3_omni_moe_talker":
        pytest.skip("its own code waits for the device, or it takes no token ids")
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # else transformers asks whether the mask is all ones
    monkeypatch.setattr(forwards, "HostCopy", lambda tensors: SimpleNamespace(tensors=tensors))
    model = family.build()
    sites = find_sites(model)
    if all(hasattr(s.experts, "has_gate") for s in sites):
        model.set_experts_implementation("batched_mm")
    model.set_attn_implementation("eager")
    model.to("meta")._hf_hook = SimpleNamespace(execution_device="meta")
    with recording(model, sites) as recorder, torch.inference_mode():
        started = forwards.forward(model, recorder, BATCH, True)
    sent: dict[Any, Tensor] = started.copy.tensors  # type: ignore[attr-defined]
    assert {t.device.type for t in sent.values()} == {"meta"}
    for at, _ in enumerate(sites):
        assert len(sent[0, at, "ids"]) == len(sent[0, at, "weights"]) == 8 and sent[0, at, "ids"].dtype == torch.int16
    assert len(started.flaws) == len([k for k in sent if k[0] == "flaw"])


def test_a_flag_that_is_read_in_a_hook_is_found() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        bool(torch.ones(2).any())
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        torch.ones(2)[torch.tensor([True, False])]
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        torch.equal(torch.ones(2), torch.ones(2))


def test_what_is_packed_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"ids": torch.arange(6, dtype=torch.int16).view(3, 2), ("w", 1): torch.randn(3, 2).bfloat16(), "one": torch.tensor(True),
             "none": torch.zeros(0, 4, dtype=torch.int16), "strided": torch.arange(6, dtype=torch.int16).view(2, 3).T}  # fmt: skip
    copies: list[int] = []
    monkeypatch.setattr(hostcopy, "_here", lambda _: False)
    monkeypatch.setattr(hostcopy, "_sent", lambda packed: copies.append(packed.numel()) or packed.clone())
    copy = HostCopy(given)
    assert sorted(copies) == [1, 6, 12]  # one for each type
    for _ in range(2):
        there = copy.arrived()
        assert there.keys() == given.keys() and all(torch.equal(there[k], t) and there[k].dtype == t.dtype for k, t in given.items())


def test_a_capture_whose_tensors_are_packed_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny.build("switch_transformers"), ["aaaaaaaaaaaa", "abababab", "b"]
    plain = [capture(model, TOKENIZER, texts, batch_size=2), capture(tiny.build("olmoe"), TOKENIZER, texts, new_tokens=2)]
    monkeypatch.setattr(hostcopy, "_here", lambda _: False)
    packed = [capture(model, TOKENIZER, texts, batch_size=2), capture(tiny.build("olmoe"), TOKENIZER, texts, new_tokens=2)]
    assert [differences(a, b) for a, b in zip(plain, packed, strict=True)] == [[], []]
    assert all(a.stats.core.equals(b.stats.core) for a, b in zip(plain, packed, strict=True))


class Logged:
    """A batch that says when it is waited for."""

    def __init__(self, log: list[str], name: str, error: Exception | None = None) -> None:
        self.log, self.name, self.error = log, name, error
        log.append(f"start {name}")

    def finish(self) -> list[Any]:
        self.log.append(f"finish {self.name}")
        if self.error is not None:
            raise self.error
        return [self.name]


def test_each_batch_is_waited_for_while_the_next_one_runs() -> None:
    log: list[str] = []

    def batches() -> Iterator[Any]:
        for part in ("ab", "c"):
            yield from (Logged(log, x) for x in part)
            yield None

    assert list(_overlapped(batches())) == [["a"], ["b"], None, ["c"], None]
    assert log == ["start a", "start b", "finish a", "start c", "finish b", "finish c"]
    assert list(_overlapped(iter([]))) == []


@pytest.mark.parametrize("error", [CaptureCancelled, PromptTooLong, RuntimeError, KeyboardInterrupt])
def test_what_came_before_an_error_is_given_out_first(error: type[BaseException]) -> None:
    def batches(first: Exception | None = None) -> Iterator[Any]:
        yield Logged([], "a", first)
        yield None
        raise error("later")

    found: list[Any] = []
    with pytest.raises(error, match="later"):
        for x in _overlapped(batches()):
            found.append(x)
    assert found == [["a"], None]
    with pytest.raises(RouterError, match="earlier"):
        list(_overlapped(batches(RouterError("earlier"))))


def test_a_part_that_was_whole_is_kept_when_the_next_text_is_too_long(tmp_path: Path) -> None:
    model = tiny.build("olmoe")
    texts = ["x" * 30, "y" * 30, "z" * 90, "w"]
    with pytest.raises(PromptTooLong, match="document 3 has 90 tokens"):
        capture(model, TOKENIZER, texts, out=tmp_path / "run", part_tokens=25, batch_size=1, max_tokens=50)
    assert sorted(p.name for p in (tmp_path / "run" / "progress").glob("part-*")) == ["part-00000.json", "part-00001.json"]
    # A resumed run may not change options, so the long text is replaced: what is there stays.
    capture(model, TOKENIZER, [*texts[:2], "z", "w"], out=tmp_path / "run", part_tokens=25, batch_size=1, max_tokens=50)
    assert open_run(tmp_path / "run").n_tokens() == 62


def test_a_flaw_is_told_once_per_forward_and_before_later_errors() -> None:
    model = FAMILIES["mixtral"].build()
    other = lambda module, given: (given[0], (given[1] + 1) % 8, *given[2:])  # noqa: E731
    find_sites(model)[1].experts.register_forward_pre_hook(other)
    name = find_sites(model)[1].info.name
    with pytest.raises(CaptureError, match=f"{name}: the experts got other ids than the router gave"):
        record(model)
    with pytest.raises(CaptureError, match="other ids than the router gave"):
        list(capture_parts(model, TOKENIZER, ["a b c", "d", "x" * 500], batch_size=1))  # the third is too long
    with recording(model) as recorder:
        run(model)
        found = [bool(f.found) for forwards_ in recorder.hand_over() for r in forwards_ for f in r.flaws]
    assert found == [False, True]


def test_parts_hold_what_a_forward_of_each_text_says() -> None:
    """Padding, the order of documents and the batch a text is in leave no trace in what is stored."""
    model, texts = tiny.build("olmoe"), ["a", "now and then", "x y z", "il pleut", "b"]
    together, alone = (capture(model, TOKENIZER, texts, batch_size=n, probabilities=True) for n in (3, 1))
    for layer in together.layers:
        a, b = together.routing(layer.index), alone.routing(layer.index)
        assert np.array_equal(a.experts, b.experts)
        np.testing.assert_allclose(a.weights, b.weights, rtol=1e-4, atol=1e-6)
    assert together.tokens["predicted"].equals(alone.tokens["predicted"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: tests/bench/check_device.py is for one")
def test_on_a_gpu_nothing_waits_and_the_run_is_that_of_the_cpu() -> None:
    texts = ["def f(x): return x", "Il pleut.", "now and then and now"]
    expected = capture(tiny.build("olmoe"), TOKENIZER, texts, batch_size=2)
    model = tiny.build("olmoe").to("cuda")
    model.set_experts_implementation("batched_mm")
    model.set_attn_implementation("eager")
    found = capture(model, TOKENIZER, texts, batch_size=2)
    for layer in found.layers:
        assert (found.experts(layer.index) == expected.experts(layer.index)).mean() > 0.95  # sums round otherwise there
    for mode in ("default", "error"):  # the first forward sets things up
        with recording(model) as recorder, torch.inference_mode():
            torch.cuda.set_sync_debug_mode(mode)
            try:
                started = forwards.forward(model, recorder, BATCH, False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert [piece.tokens for piece in started.finish()] == [8]
