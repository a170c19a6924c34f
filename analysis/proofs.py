"""Proofs, on a user's own checkpoint, that what is captured is what the model executes.

Three verdicts: "pass", "differs", and "not checked" with the reason, which is never taken for a pass. Each recomputation
brings its own control: with one captured id changed it has to fail, or it says that it proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import CaptureError, recording
from .recompute import Seen, execution, surroundings, watching
from .routers import Routed, RouterError, Site, find_sites
from .tokens import encode

PASS, DIFFERS, NOT_CHECKED = "pass", "differs", "not checked"
TEXT = "def area(r): return 3.14159 * r ** 2\nIl pleut sur la ville. 选择文件, select a file: 1 + 1 = 2."
RECOMPUTED = ("its own experts, given the captured ids and weights", "a plain loop over the experts' weights")
CANARY_TOKENS = 8
# A token's output may differ by this share of its length (2-norm): rounding of one expert's three products in that format.
ALLOWED = ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2))
LAYOUT_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class Proof:
    """One check. ``where`` is a site's name, or "" for the whole model; ``detail`` holds the measured figure or the reason."""

    name: str
    verdict: str
    detail: str
    where: str = ""


@dataclass(frozen=True)
class _Call:
    """What one call of an experts module was given (hidden, ids, weights come first, by place or by name) and returned."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    out: Tensor

    @property
    def given(self) -> tuple[Any, ...]:
        """The values in the order they were given."""
        return (*self.arguments, *self.keywords.values())

    def again(self, experts: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
        """What ``experts`` return for the same call with these ids and weights."""
        values = [self.given[0], ids, weights, *self.given[3:]]
        n = len(self.arguments)
        out: Tensor = experts(*values[:n], **dict(zip(self.keywords, values[n:], strict=True)))
        return out


def verify_model(model: Any, tokenizer: Any) -> tuple[Proof, ...]:
    """Every proof that needs nothing but the model: see the names in the returned proofs. Four forward passes.

    Raises RouterError for a model without routing or one not understood, CaptureError in training mode or for one that
    cannot run.
    """
    sites = find_sites(model)
    inputs = _inputs(model, encode(tokenizer, [TEXT])[0][: _context(model)])
    with torch.inference_mode():
        bare = [_output(model, inputs) for _ in range(2)]
    proofs, hooked, routed, calls, seen = _observed(model, sites, inputs)
    proofs.append(_hooks_change_nothing(bare, hooked))
    if routed is None:
        return (*proofs, Proof("recomputed from ids and weights", NOT_CHECKED, "nothing was captured"))
    for at in sorted({0, len(sites) - 1}):
        proofs += _piecewise(model, sites[at], seen, routed[at]) or _recomputed(sites[at], calls.get(at), routed[at])
    return tuple(proofs)


def canary(model: Any) -> None:
    """The cheap proofs, for every load: each site fires once per forward, and the same tokens are routed the same twice.

    Two forward passes of 8 tokens. Raises CaptureError with what differs, RouterError as find_sites does.
    """
    vocabulary = model.config.get_text_config().vocab_size
    inputs = _inputs(model, [i % vocabulary for i in range(1, CANARY_TOKENS + 1)])
    proofs, *_ = _observed(model, find_sites(model), inputs)
    for proof in proofs:
        if proof.verdict == DIFFERS:
            raise CaptureError(f"this model cannot be captured exactly: {proof.detail}")


def _observed(
    model: Any, sites: Sequence[Site], inputs: Mapping[str, Tensor]
) -> tuple[list[Proof], Tensor | None, list[Routed] | None, dict[int, _Call], Seen]:
    """(proofs of firing and determinism, output with hooks, what each site routed, calls of the first and last site)."""
    name, again = "every site fires once per forward", "the same input is routed the same"
    runs: list[tuple[Tensor, list[Routed]]] = []
    calls: dict[int, _Call] = {}
    seen: Seen = {}
    piecewise = [m for at in {0, len(sites) - 1} if execution(sites[at]) for m in surroundings(model, sites[at])]
    try:
        for _ in range(2):
            with recording(model, sites) as recorder, _watching(sites, calls), watching(piecewise, seen), torch.inference_mode():
                output = _output(model, inputs)
                runs.append((output, [forwards[0] for forwards in recorder.take(1)]))
    except CaptureError as error:
        if model.training or getattr(model, "is_activation_checkpointing", False):
            raise
        return [Proof(name, DIFFERS, str(error)), Proof(again, NOT_CHECKED, "nothing was captured")], None, None, {}, {}
    fired = Proof(name, PASS, f"{len(sites)} sites, {runs[0][1][0].ids.shape[0]} tokens, 2 forward passes")
    (_, first), (output, second) = runs
    return [fired, _deterministic(again, sites, first, second)], output, second, calls, seen


def _deterministic(name: str, sites: Sequence[Site], first: Sequence[Routed], second: Sequence[Routed]) -> Proof:
    for site, a, b in zip(sites, first, second, strict=True):
        if a.ids.shape != b.ids.shape or not torch.equal(a.ids, b.ids):
            wrong = int((a.ids != b.ids).sum()) if a.ids.shape == b.ids.shape else a.ids.numel()
            return Proof(name, DIFFERS, f"{site.info.name} sent {wrong} of {a.ids.numel()} assignments elsewhere the second time:"
                         " weights that are not loaded, or random routing", site.info.name)  # fmt: skip
        if not torch.equal(a.weights, b.weights):
            return Proof(name, DIFFERS, f"{site.info.name} gave the same experts other weights the second time", site.info.name)
    n = sum(r.ids.numel() for r in first)
    return Proof(name, PASS, f"{n:,} ids and weights equal, bit for bit")


def _hooks_change_nothing(bare: Sequence[Tensor], hooked: Tensor | None) -> Proof:
    name = "outputs are the same with and without hooks"
    if hooked is None:
        return Proof(name, NOT_CHECKED, "the forward pass with hooks did not finish")
    if not torch.equal(bare[0], bare[1]):
        return Proof(name, NOT_CHECKED, "without hooks, the model gives other outputs each time")
    if not torch.equal(bare[0], hooked):
        return Proof(name, DIFFERS, f"outputs differ by up to {(bare[0].float() - hooked.float()).abs().max():.1e}")
    return Proof(name, PASS, f"{hooked.numel():,} numbers equal, bit for bit")


@contextmanager
def _watching(sites: Sequence[Site], calls: dict[int, _Call]) -> Iterator[None]:
    """Keep what the experts of the first and last site are given and return, while the block runs."""

    def keep(at: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        if isinstance(out, Tensor):  # copies, because a block may go on in place
            own = [x.detach().clone() if isinstance(x, Tensor) else x for x in (*arguments, *keywords.values())]
            n = len(arguments)
            calls[at] = _Call(tuple(own[:n]), dict(zip(keywords, own[n:], strict=True)), out.detach().clone())

    handles = []
    try:
        for at in {0, len(sites) - 1}:
            handles.append(sites[at].experts.register_forward_hook(partial(keep, at), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _piecewise(model: nn.Module, site: Site, seen: Seen, routed: Routed) -> list[Proof]:
    """The same for a site that calls its experts otherwise than the contract says; empty where there is no entry for it."""
    how = execution(site)
    if how is None:
        return []
    own, loop = RECOMPUTED
    first = Proof(own, NOT_CHECKED, f"{type(site.block).__name__} does not hand ids and weights to one module", site.info.name)
    with torch.inference_mode():
        out = how.observed(model, site, seen)
    return [first, _compared(loop, site, out, routed, lambda i, w: how.recompute(site, seen, i, w))]


def _recomputed(site: Site, call: _Call | None, routed: Routed) -> list[Proof]:
    """The experts' output again, in two ways: by the model's own experts module, and by a plain loop over its weights."""
    own, loop = RECOMPUTED
    kind = type(site.experts).__name__
    if call is None:
        reason = f"{kind} was not called as a module that returns one tensor"
        return [Proof(n, NOT_CHECKED, reason, site.info.name) for n in (own, loop)]
    hidden, ids = call.given[0], call.given[1] if len(call.given) > 2 else None
    takes_ids = isinstance(ids, Tensor) and ids.shape == routed.ids.shape and torch.equal(ids.to(routed.ids.dtype), routed.ids)
    first = Proof(own, NOT_CHECKED, f"{kind} does not take the captured ids as they are", site.info.name)
    if takes_ids:
        first = _compared(own, site, call.out, routed, lambda i, w: call.again(site.experts, i, w))
    expert = _plain_expert(site)
    if isinstance(expert, str):
        return [first, Proof(loop, NOT_CHECKED, expert, site.info.name)]
    second = _compared(loop, site, call.out, routed, lambda i, w: _looped(expert, hidden.flatten(0, -2), i, w))
    return [first, second]


def _compared(name: str, site: Site, out: Tensor, routed: Routed, again: Callable[[Tensor, Tensor], Tensor]) -> Proof:
    """Recompute with the captured ids, then with one of them changed, which must not go unnoticed."""
    allowed = dict(ALLOWED).get(out.dtype)
    if allowed is None:
        return Proof(name, NOT_CHECKED, f"no tolerance is known for {out.dtype}", site.info.name)
    wrong = _one_changed(routed, site.info.n_experts)
    if wrong is None:
        return Proof(name, NOT_CHECKED, "no token was sent to an expert with weights, or there is only one", site.info.name)
    with torch.inference_mode():
        error = _distance(out, again(routed.ids, routed.weights))
        control = _distance(out, again(wrong, routed.weights))
    figures = f"largest error {error:.1e} of a token's output, allowed {allowed:.0e}; with one id changed {control:.1e}"
    if not error <= allowed:  # so that NaN differs
        return Proof(name, DIFFERS, figures, site.info.name)
    if not control > 5 * allowed:
        return Proof(name, NOT_CHECKED, f"one changed id goes unnoticed, so this proves nothing ({figures})", site.info.name)
    return Proof(name, PASS, figures, site.info.name)


def _one_changed(routed: Routed, n_experts: int) -> Tensor | None:
    """Captured ids [N, k] with one replaced, where the weight is largest; None where nothing can be replaced."""
    real = (routed.ids >= 0) & (routed.ids < n_experts)
    if n_experts < 2 or not bool(real.any()):
        return None
    at = int(routed.weights.float().abs().masked_fill(~real, -1).argmax())
    row, slot = divmod(at, routed.ids.shape[1])
    taken = set(routed.ids[row].tolist())
    was = int(routed.ids[row, slot])
    free = [e for e in range(n_experts) if e not in taken] or [e for e in range(n_experts) if e != was]
    wrong = routed.ids.clone()
    wrong[row, slot] = free[0]
    return wrong


def _distance(out: Tensor, again: Tensor) -> float:
    """Largest over tokens of |again - out| / |out|, 2-norms in float64; a token without output counts against the longest."""
    a, b = (x.reshape(-1, x.shape[-1]).double() for x in (out, again))
    length = a.norm(dim=-1)
    return float(((b - a).norm(dim=-1) / length.clamp_min(1e-6 * float(length.max())).clamp_min(1e-300)).max())


def _looped(expert: Callable[[int, Tensor], Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """float32 [N, H]: sum over slots of weight x (that expert alone), expert by expert; -1 adds nothing."""
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for e in ids.unique().tolist():
        rows, slots = torch.where(ids == e)
        if e >= 0:
            out.index_add_(0, rows, expert(e, hidden[rows]).float() * weights[rows, slots, None].float())
    return out


def _plain_expert(site: Site) -> Callable[[int, Tensor], Tensor] | str:
    """(id, hidden [n, H]) -> [n, H] of one expert alone, read from its weights; or why that is not possible."""
    experts, n, kind = site.experts, site.info.n_experts, type(site.experts).__name__
    weights = list(experts.parameters())
    if site.info.n_special:
        return f"what {kind} does for its {site.info.n_special} classes without weights is its own"
    if any(p.is_meta for p in weights):
        return "the experts' weights are not in memory"
    if any(p.dtype not in dict(ALLOWED) for p in weights):
        return f"the weights of {kind} are quantised"
    separate = {name: m for name, m in experts.named_children() if name.removeprefix("expert_").isdigit()}
    if separate and not list(experts.parameters(recurse=False)):
        by_id = {int(name.removeprefix("expert_")): m for name, m in separate.items()}
        return (lambda e, h: by_id[e](h)) if sorted(by_id) == list(range(n)) else f"{kind} numbers its experts otherwise"
    # Transformers sets these flags on classes whose weights any implementation may read, so what they mean is agreed.
    if not all(hasattr(experts, flag) for flag in LAYOUT_FLAGS) or not isinstance(getattr(experts, "down_proj", None), Tensor):
        return f"how {kind} lays out its weights is unknown"
    return lambda e, h: _stacked_expert(experts, e, h)


def _stacked_expert(experts: Any, e: int, hidden: Tensor) -> Tensor:
    """One expert in float32: gate_up_proj [E, 2I, H] (or up_proj [E, I, H]), activation, down_proj [E, H, I]."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)[e].float()
        bias = getattr(experts, f"{name}_bias")[e].float() if experts.has_bias else None
        return F.linear(x, weight.T if experts.is_transposed else weight, bias)

    inner = linear(hidden.float(), up)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    out = linear(inner, "down_proj")
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def _output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    try:
        out = model(**inputs, use_cache=False)
    except (CaptureError, RouterError, MemoryError):
        raise
    except Exception as error:  # a model may raise anything; a traceback would help nobody but its author
        raise CaptureError(f"the model cannot run at all ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    main: Tensor = out[0] if getattr(out, "logits", None) is None else out.logits
    return main


def _inputs(model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    given = {"input_ids": torch.tensor([list(ids)], device=model.device)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"].clone()
    return given


def _context(model: Any) -> int | None:
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest
