"""Routerscope's backend: exact routing of mixture-of-experts models. Nothing here imports torch until it is needed."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capacity import apply_capacity
    from .capture import capture
    from .metrics import METRICS
    from .models import load_model
    from .slots import expert_capacity
    from .store import open_run
    from .trace import Trace

__version__ = "0.1.0"
__all__ = ["METRICS", "Trace", "apply_capacity", "capture", "expert_capacity", "load_model", "open_run"]
_HOME = {
    "apply_capacity": "capacity",
    "capture": "capture",
    "expert_capacity": "slots",
    "load_model": "models",
    "open_run": "store",
    "Trace": "trace",
    "METRICS": "metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the submodule ``capture`` binds it here under the name of the public function; keep the function.

    The module itself stays within reach as ``from analysis.capture import ...``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        submodule = isinstance(value, ModuleType) and _HOME.get(name) == name
        super().__setattr__(name, getattr(value, name) if submodule else value)


sys.modules[__name__].__class__ = _Package
