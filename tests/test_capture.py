"""Capture against what the model executed: recomputation, perturbation, bit-equal outputs, threads, every named error."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from analysis.capture import CaptureCancelled, CaptureError, PromptTooLong, capture, capture_parts, recording
from analysis.routers import find_sites
from analysis.tokens import Pieces
from analysis.trace import NO_EXPERT

from . import tiny
from .synthetic import differences

TEXTS = ["def f(x): return x", "Il pleut.", "选择文件 🎉 now and then"]
TOKENIZER = tiny.tokenizer()


def inputs(model: Any, n: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(4, tiny.VOCABULARY, (2, n))
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {"input_ids": ids}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recomputed_from_captured_ids_and_weights(family: str) -> None:
    """sum over slots of weight x (that expert alone) equals what the experts module returned; one wrong id breaks it."""
    model = tiny.build(family)
    sites = find_sites(model)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        s.experts.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, (a[0].detach().clone(), out.detach().clone())))
        for i, s in enumerate(sites)
    ]
    with torch.no_grad(), recording(model) as recorder:
        model(**inputs(model))
    routed = [r[0] for r in recorder.take()]
    for handle in handles:
        handle.remove()
    for i, site in enumerate(sites):
        hidden, out = seen[i]
        alone = torch.stack([run_alone(site, hidden, e) for e in range(site.info.n_experts)])
        again = combined(alone, routed[i].ids, routed[i].weights)
        assert (again - out).abs().max() <= 1e-5 * out.abs().max()
        wrong = routed[i].ids.clone()
        at = int((wrong[:, 0] >= 0).nonzero()[0])
        wrong[at, 0] = next(e for e in range(site.info.n_experts) if e not in wrong[at].tolist())
        assert (combined(alone, wrong, routed[i].weights) - out).abs().max() > 1e-3 * out.abs().max()


def run_alone(site: Any, hidden: torch.Tensor, expert: int) -> torch.Tensor:
    n = hidden.shape[0]
    ones = torch.ones(n, 1, dtype=hidden.dtype)
    with torch.no_grad():
        if site.info.native_capacity is not None:
            mask = torch.zeros(n, 1, site.info.n_experts, dtype=torch.long)
            mask[:, :, expert] = 1
            return site.experts(hidden, mask, ones)
        return site.experts(hidden, torch.full((n, 1), expert), ones)


def combined(alone: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(ids.shape[0])
    out = torch.zeros_like(alone[0])
    for slot in range(ids.shape[1]):
        kept = ids[:, slot] >= 0
        out[kept] += weights[kept, slot, None] * alone[ids[kept, slot], rows[kept]]
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_perturbing_an_expert_changes_exactly_its_tokens(family: str) -> None:
    """Uses only the parameter layout, never the router: rows that change are the rows captured on that expert."""
    model = tiny.build(family)
    for i, site in enumerate(find_sites(model)):
        outputs: list[torch.Tensor] = []
        handle = site.experts.register_forward_hook(lambda m, a, out, kept=outputs: kept.append(out.detach().clone()))
        with torch.no_grad(), recording(model) as recorder:
            model(**inputs(model))
        ids = recorder.take()[i][0].ids
        changes = 0
        for expert in range(site.info.n_experts):
            switch = family == "switch_transformers"
            weight = site.experts[f"expert_{expert}"].wo.weight if switch else site.experts.down_proj[expert]
            before = weight.detach().clone()
            with torch.no_grad():
                weight.mul_(3.0)
                model(**inputs(model))
                weight.copy_(before)
            changed = (outputs[-1] - outputs[0]).abs().amax(-1) > 0
            assert torch.equal(changed, (ids == expert).any(-1)), (site.info.name, expert)
            changes += int(changed.sum())
        handle.remove()
        assert changes > 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outputs_are_bit_equal_and_hooks_are_gone(family: str) -> None:
    model = tiny.build(family)
    with torch.no_grad():
        bare = model(**inputs(model)).logits
        with recording(model) as recorder:
            hooked = model(**inputs(model)).logits
            recorder.take()
    assert torch.equal(bare, hooked)
    with pytest.raises(ZeroDivisionError), recording(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_batch_equals_single_documents(family: str) -> None:
    model = tiny.build(family)
    together = capture(model, TOKENIZER, TEXTS, batch_size=3)
    one_by_one = capture(model, TOKENIZER, TEXTS, batch_size=1)
    assert together.n_tokens(together.layers[0].stream) == sum(len(x.encode()) for x in TEXTS)
    for layer in together.layers:
        assert np.array_equal(together.experts(layer.index), one_by_one.experts(layer.index))
        np.testing.assert_allclose(together.weights(layer.index), one_by_one.weights(layer.index), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "switch_transformers"])
def test_generation_equals_teacher_forcing(family: str) -> None:
    model = tiny.build(family)
    made = capture(model, TOKENIZER, ["Il pleut"], new_tokens=4)
    ids = made.tokens["token_id"].to_pylist()
    assert made.tokens["phase"].to_pylist() == ["prefill"] * 8 + ["decode"] * (len(ids) - 8)
    assert 8 < len(ids) <= 8 + 4 - 1
    with torch.no_grad(), recording(model) as recorder:
        model(input_ids=torch.tensor([ids]))
    for layer, forwards in zip(made.layers, recorder.take(), strict=True):
        assert np.array_equal(np.sort(made.experts(layer.index), 1), forwards[0].ids.sort(1).values.numpy())


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
