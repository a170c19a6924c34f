"""Hooks that see every routing decision of a forward, and the Recorder that keeps them apart by site and thread.

No hook waits for the device: what it finds wrong with what was recorded is looked at once per forward (``take``).

A pre-hook on what executes a site sees the ids and weights executed; a hook on the router adds its scores. Hooks exist only
inside ``recording`` and answer only to the thread that opened it, so captures in several threads never see each other's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .families import Flaw, differs
from .routers import Call, Routed, Site, find_sites

_ACTIVE: ContextVar[Recorder | None] = ContextVar("routerscope_recorder", default=None)


class CaptureError(RuntimeError):
    """A capture that cannot be exact; the message says what, where and what to do."""


class CaptureCancelled(CaptureError):
    """The caller's ``cancelled`` said stop. Parts written so far stay, and the capture can be resumed."""


class Recorder:
    """Collects what the hooks saw, forward by forward, for the thread that opened it."""

    def __init__(self, sites: Sequence[Site], cancelled: Callable[[], bool] | None = None) -> None:
        self.sites = tuple(sites)
        self.cancelled = cancelled
        self._outputs: list[list[Any]] = [[] for _ in sites]
        self._routed: list[list[Routed]] = [[] for _ in sites]
        self._order: list[int] = []

    def router_done(self, at: int, output: Any) -> None:
        self._outputs[at].append(output)

    def experts_called(self, at: int, arguments: Mapping[str, Any]) -> None:
        """Note what site ``at`` executes: the ``arguments`` of its experts, read with what its router returned."""
        site = self.sites[at]
        if self.cancelled is not None and self.cancelled():
            raise CaptureCancelled("capture cancelled")
        if len(self._outputs[at]) != len(self._routed[at]) + 1:
            raise CaptureError(f"{site.info.name}: the experts ran without one call of the router before them")
        output = self._outputs[at][-1]
        self._outputs[at][-1] = None
        ids, weights = (arguments[n].detach().clone() if n else None for n in (site.id_name, site.weight_name))
        said = output[site.kind.ids_at] if isinstance(output, tuple) and site.kind.ids_at is not None else None
        call = Call(site.router, site.block, output, arguments, ids, weights, _logits(site, output))
        routed = site.kind.adapter(call)
        if isinstance(said, Tensor) and ids is not None and said.numel() == ids.numel():
            patched = CaptureError(f"{site.info.name}: the experts got other ids than the router gave; a patch sits between"
                                   " them (expert placement, remapping): remove it and capture again")  # fmt: skip
            routed = replace(routed, flaws=(Flaw(differs(said.reshape(ids.shape), ids), patched), *routed.flaws))
        self._routed[at].append(routed)
        self._order.append(at)

    def take(self, forwards: int | None = 1) -> list[list[Routed]]:
        """Per site, what each forward routed; empties the recorder. Waits for the device.

        Raises CaptureError unless every site fired exactly ``forwards`` times (None: equally often), in their order; and what the first
        flaw says that was found.
        """
        taken = self.hand_over(forwards)
        for flaw in (f for forward in zip(*taken, strict=True) for routed in forward for f in routed.flaws):
            if flaw.found:
                raise flaw.error
        return taken

    def hand_over(self, forwards: int | None = 1) -> list[list[Routed]]:
        """``take`` without waiting: whether there is a flaw is for the caller to see, before anything is made of it."""
        counts = [len(r) for r in self._routed]
        wanted = counts[0] if forwards is None else forwards
        for site, routed, outputs in zip(self.sites, self._routed, self._outputs, strict=True):
            if len(routed) != wanted or len(outputs) != wanted or wanted == 0:
                raise CaptureError(
                    f"{site.info.name} routed {len(routed)} times in {wanted} forward passes: its forward is compiled,"
                    " replaced by a kernel, checkpointed or skipped; load the model plainly and capture again"
                )
        if self._order != list(range(len(self.sites))) * wanted:
            order = ", ".join(self.sites[at].info.name for at in self._order[: len(self.sites)])
            raise CaptureError(f"the sites ran in another order than the model lists them ({order}): flows between them would be wrong")
        self._order = []
        taken, self._routed = self._routed, [[] for _ in self.sites]
        self._outputs = [[] for _ in self.sites]
        return taken


class _OffloadGuard(TorchDispatchMode):
    """Refuses operations on weights that are offloaded at that moment: torch runs them and returns uninitialised memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if "meta" in devices and len(devices) > 1:
            raise CaptureError(f"the model reads weights while they are offloaded ({func}) and computes garbage:"
                               " load it without weights on disk")  # fmt: skip
        return func(*args, **(kwargs or {}))


@contextmanager
def recording(model: nn.Module, sites: Sequence[Site] | None = None,
              cancelled: Callable[[], bool] | None = None) -> Iterator[Recorder]:  # fmt: skip
    """Hooks on every site of ``model`` while the block runs, removed afterwards whatever happens.

    Raises CaptureError in training mode, under gradient checkpointing, or where offloaded weights are read unloaded;
    RouterError as find_sites does.
    """
    if model.training:
        raise CaptureError("the model is in training mode, where routers add noise: call model.eval() first")
    if getattr(model, "is_activation_checkpointing", False):
        raise CaptureError("gradient checkpointing runs blocks twice: call model.gradient_checkpointing_disable() first")
    recorder = Recorder(find_sites(model) if sites is None else sites, cancelled)
    handles = []
    token = _ACTIVE.set(recorder)
    try:
        for at, site in enumerate(recorder.sites):
            handles.append(site.router.register_forward_hook(partial(_after_router, recorder, at)))
            hook = partial(_before_experts, recorder, at)
            handles.append(site.boundary.register_forward_pre_hook(hook, with_kwargs=True))
        with _OffloadGuard() if any(p.is_meta for p in model.parameters()) else nullcontext():
            yield recorder
    finally:
        _ACTIVE.reset(token)
        for handle in handles:
            handle.remove()


def _logits(site: Site, output: Any) -> Tensor | None:
    """The scores in a router's output, copied; None where the router is not known."""
    if site.info.scoring == "unknown":
        return None
    scores = output[site.kind.logits_at] if isinstance(output, tuple) and len(output) > site.kind.logits_at else output
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise CaptureError(f"{site.info.name}: its router returned no scores where families.py says they are;"
                           " this is another version of the model than its entry describes")  # fmt: skip
    return scores.detach().clone()


def _after_router(recorder: Recorder, at: int, module: nn.Module, arguments: Any, output: Any) -> None:
    if _ACTIVE.get() is recorder:
        recorder.router_done(at, output)


def _before_experts(
    recorder: Recorder,
    at: int,
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
) -> None:
    # Torch adds a hook and notes "with keywords" in two steps: between them another thread's forward calls it without.
    if _ACTIVE.get() is recorder:
        names = recorder.sites[at].parameters
        recorder.experts_called(at, dict(zip(names, arguments, strict=False)) | (keywords or {}))
