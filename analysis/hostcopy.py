"""Tensors on their way from a device to the host, while the device goes on computing.

On a GPU the tensors of one kind are put into one, which is copied into pinned memory behind the kernels that make it; an event says when it
has arrived. Tensors on the CPU are there already, and are not copied. Nothing here waits but ``arrived``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Key = TypeVar("_Key", bound=Hashable)


class HostCopy(Generic[_Key]):
    """The copy of some tensors to the host, under way from the moment this is made."""

    def __init__(self, tensors: Mapping[_Key, Tensor]) -> None:
        self._there = {k: t for k, t in tensors.items() if _here(t)}
        self._packs: list[tuple[list[tuple[_Key, torch.Size]], Tensor]] = []
        self._events = []
        for keys in _alike(tensors):
            packed = pack([tensors[k] for k in keys])
            self._packs.append(([(k, tensors[k].shape) for k in keys], _sent(packed)))
        for device in {t.device for t in tensors.values() if t.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def arrived(self) -> dict[_Key, Tensor]:
        """Every tensor on the host; waits for those that are still under way."""
        for event in self._events:
            event.synchronize()
        for members, packed in self._packs:
            self._there |= zip([k for k, _ in members], unpack(packed, [shape for _, shape in members]), strict=True)
        self._packs, self._events = [], []
        return self._there


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of tensors of one type and device, one after the other."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unpack(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors that were packed, as views."""
    return [t.view(shape) for t, shape in zip(packed.split([s.numel() for s in shapes]), shapes, strict=True)]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor of the host on ``device``; the host does not wait, since pageable memory is staged by the driver at once."""
    return tensor.to(device, non_blocking=True)


def _here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _alike(tensors: Mapping[_Key, Tensor]) -> list[list[_Key]]:
    """The keys of tensors that are elsewhere, those of one type and device together."""
    found: dict[tuple[torch.device, torch.dtype], list[_Key]] = {}
    for key, tensor in tensors.items():
        if not _here(tensor):
            found.setdefault((tensor.device, tensor.dtype), []).append(key)
    return list(found.values())


def _sent(packed: Tensor) -> Tensor:
    if packed.device.type != "cuda":  # no other device here has pinned memory and events: it is waited for
        return packed.cpu()
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    return host.copy_(packed, non_blocking=True)
