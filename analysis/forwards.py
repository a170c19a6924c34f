"""One batch of documents through the model: the forward and what is computed of it on the device, without waiting for it.

``forward`` and ``generate`` answer as soon as the work is given to the device; ``Started.finish`` waits for what it sends. In between
another batch can be started, so that a GPU computes while the host makes arrays of what came before.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .assembling import UNKNOWN, Document, Fed, Piece
from .families import Flaw
from .hostcopy import HostCopy, to_device
from .recorder import CaptureError, Recorder
from .routers import Routed, RouterError, Site, router_scores
from .trace import LayerInfo, SiteRouting, SiteScores, id_dtype


@dataclass(frozen=True)
class Group:
    """Documents of one stream and where in a copy their arrays are: under ``number`` and, by site, under their names.

    ``loss_at`` and ``predicted_at`` are the rows that have a loss, a prediction.
    """

    number: int
    stream: str
    fed: tuple[Fed, ...]
    loss_at: np.ndarray
    predicted_at: np.ndarray


@dataclass(frozen=True)
class Started:
    """A batch whose results are on their way."""

    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    copy: HostCopy[Hashable]
    flaws: tuple[Flaw, ...]

    def finish(self) -> list[Piece]:
        """Wait for the results. Raises what the first flaw says that the device found."""
        there = self.copy.arrived()
        for i, flaw in enumerate(self.flaws):
            if there["flaw", i]:
                raise flaw.error
        return [self._piece(group, there) for group in self.groups]

    def _piece(self, group: Group, there: dict[Hashable, Tensor]) -> Piece:
        n = sum(len(f.ids) for f in group.fed)
        loss, predicted = np.full(n, np.nan, np.float32), np.full(n, UNKNOWN, np.int32)
        for column, name, at in ((loss, "loss", group.loss_at), (predicted, "predicted", group.predicted_at)):
            if (group.number, name) in there:
                column[at] = there[group.number, name].numpy()
        routing: list[SiteRouting | None] = []
        scores: list[SiteScores | None] = []
        sums: list[np.ndarray | None] = []
        for i, site in enumerate(self.sites):
            mine = {name: there.get((group.number, i, name)) for name in _ARRAYS} if site.info.stream == group.stream else None
            routing.append(None if mine is None else _routing(site.info, mine))
            scores.append(None if mine is None else _scores(n, mine))
            sums.append(None if mine is None or (total := mine["sums"]) is None else total.numpy())
        return Piece(group.stream, group.fed, loss, predicted, tuple(routing), tuple(scores), tuple(sums))


_ARRAYS = ("ids", "weights", "chosen", "entropy", "margin", "logsumexp", "probabilities", "sums")


def forward(model: Any, recorder: Recorder, batch: Sequence[Document], probabilities: bool) -> Started:
    """One padded forward. Padding goes right, where neither attention nor a native capacity lets it touch real tokens."""
    lengths = [len(d.ids) for d in batch]
    ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(batch):
        ids[row, : lengths[row]] = torch.tensor(document.ids)
        mask[row, : lengths[row]] = 1
    device, two_streams = _device(model), bool(model.config.is_encoder_decoder)
    given: dict[str, Any] = {"input_ids": to_device(ids, device), "attention_mask": to_device(mask, device)}
    fed = {"decoder": tuple(Fed(d, d.ids, len(d.ids)) for d in batch)}
    if two_streams:
        start = model.config.decoder_start_token_id or 0
        given["decoder_input_ids"] = torch.full((len(batch), 1), start, device=device)
        fed = {"encoder": fed["decoder"], "decoder": tuple(Fed(d, [start], 1) for d in batch)}
    logits = _next_token_logits(model, model(**given, use_cache=False))
    routed = [forwards[0] for forwards in recorder.hand_over(1)]
    _check_rows(recorder.sites, routed, {"decoder": len(batch) if two_streams else ids.numel(), "encoder": ids.numel()})
    tensors: dict[Hashable, Tensor] = {}
    groups = []
    for number, (stream, mine) in enumerate(fed.items()):
        length, width = [len(f.ids) for f in mine], 1 if two_streams and stream == "decoder" else ids.shape[1]
        loss_at = np.zeros(0, int)
        if logits is not None and stream == "decoder":
            tensors[number, "predicted"] = torch.cat([logits[row, :n].argmax(-1) for row, n in enumerate(length)])
            if losses := [] if two_streams else _losses(logits, given["input_ids"], length):
                tensors[number, "loss"] = torch.cat(losses)
                loss_at = np.delete(np.arange(sum(length)), np.cumsum(length) - 1)
        groups.append(Group(number, stream, mine, loss_at, np.arange(sum(length))))
        tensors |= _site_tensors(groups[-1], recorder.sites, routed, width, probabilities)
    return _started(recorder.sites, groups, tensors, routed)


def generate(model: Any, recorder: Recorder, batch: Sequence[Document], new: int, probabilities: bool) -> Started:
    """Greedy continuation, one document at a time: the first forward is the prefill, each later one a decode step.

    Every token is waited for: the next one depends on it.
    """
    if model.config.is_encoder_decoder:
        raise CaptureError("generation is recorded for decoder-only models; capture without new tokens")
    tensors: dict[Hashable, Tensor] = {}
    groups = []
    for number, document in enumerate(batch):
        ids = torch.tensor([document.ids], device=_device(model))
        with _last_predictions(model) as last:
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, num_beams=1)
        routed = [_joined(forwards) for forwards in recorder.take(None)]
        fed = made[0, : routed[0].ids.shape[0]].tolist()
        _check_rows(recorder.sites, routed, {"decoder": len(fed)})
        if fed[: len(document.ids)] != document.ids or len(fed) != made.shape[1] - 1:
            raise CaptureError(f"{document.name}: generation fed {len(fed)} tokens of {made.shape[1]}; use plain greedy search")
        if last:
            tensors[number, "predicted"] = torch.stack(last)
        at = np.arange(len(fed) - len(last), len(fed))
        groups.append(Group(number, "decoder", (Fed(document, fed, len(document.ids)),), at[:0], at))
        tensors |= _site_tensors(groups[-1], recorder.sites, routed, len(fed), probabilities)
    return _started(recorder.sites, groups, tensors, [])


def _started(sites: Sequence[Site], groups: Sequence[Group], tensors: dict[Hashable, Tensor], routed: Sequence[Routed]) -> Started:
    flaws = tuple(f for r in routed for f in r.flaws)
    return Started(tuple(sites), tuple(groups), HostCopy(tensors | {("flaw", i): f.found for i, f in enumerate(flaws)}), flaws)


def _device(model: Any) -> Any:
    """Where inputs belong; a model offloaded whole is on the meta device but runs elsewhere."""
    if model.device.type != "meta":
        return model.device
    return getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu"


def _next_token_logits(model: Any, output: Any) -> Tensor | None:
    """Logits over the vocabulary [B, T, V]; None for a model without language head, whose tokens have no loss."""
    return output.logits if model.get_output_embeddings() is not None else None


def _losses(logits: Tensor, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """float32 [n - 1] for each document of two tokens or more: nats of predicting the next one, document by document to spare memory."""
    targets = to_device(ids, logits.device)
    return [F.cross_entropy(logits[row, : n - 1].float(), targets[row, 1:n], reduction="none") for row, n in enumerate(lengths) if n > 1]


def _check_rows(sites: Sequence[Site], routed: Sequence[Routed], tokens: dict[str, int]) -> None:
    for site, one in zip(sites, routed, strict=True):
        if len(one.ids) != tokens[site.info.stream]:
            raise CaptureError(f"{site.info.name} routed {len(one.ids)} of {tokens[site.info.stream]} tokens: which ones cannot be told")


@contextmanager
def _last_predictions(model: Any) -> Iterator[list[Tensor]]:
    """Collects the id of the largest logit at the last position of every forward that this thread runs; [] without language head.

    generate computes no logits before the prompt's last token, and what it picks may be bent by the model's generation settings.
    """
    found: list[Tensor] = []
    mine, head = threading.get_ident(), model.get_output_embeddings() is not None

    def keep(_module: Any, _given: Any, output: Any) -> None:
        if head and threading.get_ident() == mine:
            found.append(output.logits[0, -1].argmax())

    hook = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _joined(forwards: Sequence[Routed]) -> Routed:
    ids = torch.cat([r.ids for r in forwards])
    same = all(r.chosen is r.ids for r in forwards)
    logits = [r.logits for r in forwards if r.logits is not None]
    return Routed(
        ids,
        torch.cat([r.weights for r in forwards]),
        ids if same else torch.cat([r.chosen for r in forwards]),
        torch.cat([x.flatten(0, -2) for x in logits]) if len(logits) == len(forwards) else None,
    )


def _site_tensors(group: Group, sites: Sequence[Site], routed: Sequence[Routed], width: int, probabilities: bool) -> dict[Hashable, Tensor]:
    """What goes to the host of every site of a group's stream, by (number, site, name); documents lie ``width`` rows apart."""
    lengths = [len(f.ids) for f in group.fed]
    kept = None if all(n == width for n in lengths) else torch.cat([torch.arange(n) + row * width for row, n in enumerate(lengths)])
    found: dict[Hashable, Tensor] = {}
    for at, (site, whole) in enumerate(zip(sites, routed, strict=True)):
        if site.info.stream != group.stream:
            continue
        if whole.ids.shape[1] != site.info.top_k:
            raise RouterError(
                f"{site.info.name} routed each token to {whole.ids.shape[1]} experts, its configuration says {site.info.top_k}"
            )
        if kept is not None and kept.device != whole.ids.device:
            kept = to_device(kept, whole.ids.device)
        rows = _rows(whole, kept)
        narrow = torch.int16 if id_dtype(site.info.n_classes) == np.int16 else torch.int32
        mine = {"ids": rows.ids.to(narrow), "weights": rows.weights} | _score_tensors(site.info, rows, lengths, probabilities)
        if rows.chosen is not rows.ids:
            mine["chosen"] = rows.chosen.to(narrow)
        found |= {(group.number, at, name): tensor for name, tensor in mine.items()}
    return found


def _rows(whole: Routed, kept: Tensor | None) -> Routed:
    logits = None if whole.logits is None else whole.logits.flatten(0, -2)
    if kept is None:
        return replace(whole, logits=logits)
    ids, weights, logits = whole.ids[kept], whole.weights[kept], None if logits is None else logits[kept]
    return Routed(ids, weights, ids if whole.chosen is whole.ids else whole.chosen[kept], logits)


def _score_tensors(info: LayerInfo, routed: Routed, lengths: Sequence[int], probabilities: bool) -> dict[str, Tensor]:
    """Entropy, margin, logsumexp and sums of probabilities from the router's logits; none of them where its scores are not known."""
    if routed.logits is None:
        return {}
    # On the CPU each document by itself: the last few elements of a loop are rounded another way, and a document's must not hang on its neighbours.
    pieces = list(lengths) if routed.logits.device.type == "cpu" else [len(routed.logits)]
    scored = [
        _scored(info, x, chosen, probabilities) for x, chosen in zip(routed.logits.split(pieces), routed.chosen.split(pieces), strict=True)
    ]
    return {name: torch.cat([x[name] for x in scored]) for name in scored[0]}


def _scored(info: LayerInfo, logits: Tensor, chosen: Tensor, probabilities: bool) -> dict[str, Tensor]:
    """Of some tokens; ``sums`` float64 [1, classes] of the probabilities, which go on themselves only where asked for: they are wide."""
    shares, selection, volume = router_scores(info, logits)
    entropy = torch.special.entr(shares).sum(-1)
    margin = torch.full_like(entropy, torch.nan)
    if selection is not None and info.top_k < selection.shape[1]:
        taken = torch.zeros_like(selection, dtype=torch.bool).scatter_(1, chosen.to(torch.long), True)
        last = selection.masked_fill(~taken, torch.inf).amin(-1)
        margin = last - selection.masked_fill(taken, -torch.inf).amax(-1)
    if shares.device.type == "cpu":
        sums = torch.from_numpy(shares.numpy().sum(0, dtype=np.float64, keepdims=True))
    else:
        sums = shares.sum(0, dtype=torch.float64, keepdim=True)
    return {"entropy": entropy, "margin": margin, "logsumexp": volume, "sums": sums} | ({"probabilities": shares} if probabilities else {})


def _routing(info: LayerInfo, mine: dict[str, Tensor | None]) -> SiteRouting:
    ids, weights, chosen = mine["ids"], mine["weights"], mine["chosen"]
    assert ids is not None and weights is not None
    experts = ids.numpy()
    before = experts if chosen is None else chosen.numpy()
    return SiteRouting(experts, weights.float().numpy(), experts if np.array_equal(experts, before) else before)


def _scores(n: int, mine: dict[str, Tensor | None]) -> SiteScores:
    """NaN where the router's scores are not known."""
    unknown = np.full(n, np.nan, np.float32)
    first, second, third = (unknown if (x := mine[c]) is None else x.numpy() for c in ("entropy", "margin", "logsumexp"))
    shares = mine["probabilities"]
    return SiteScores(first, second, third, None if shares is None else shares.numpy())
