"""Counts out of OLMoE's published pickles without unpickling: a pickle can run code, these opcodes cannot."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

SIMPLE = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "NONE": lambda: None, "NEWFALSE": lambda: False, "NEWTRUE": lambda: True}
VALUES = {"SHORT_BINUNICODE", "SHORT_BINBYTES", "BININT", "BININT1", "BININT2"}


def made(name: str, arguments: tuple) -> Any:
    """What a call in the file stands for, of the four it may hold."""
    if name == "numpy.core.multiarray.scalar":
        return int.from_bytes(arguments[1], "little")
    if name in ("collections.Counter", "collections.defaultdict"):
        return dict(arguments[0]) if arguments and isinstance(arguments[0], dict) else {}
    if name == "numpy.dtype":
        return None
    raise ValueError(f"a pickle of counters does not call {name}")


def read_counters(path: Path) -> Any:
    """Lists of dicts of ints. Raises ValueError on any other call or opcode."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []

    def since_mark() -> list[Any]:
        at = marks.pop()
        out = stack[at:]
        del stack[at:]
        return out

    for opcode, value, _ in pickletools.genops(path.read_bytes()):
        name = opcode.name
        if name in SIMPLE:
            stack.append(SIMPLE[name]())
        elif name in VALUES:
            stack.append(value)
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name == "BINGET":
            stack.append(memo[value])
        elif name == "STACK_GLOBAL":
            stack[-2:] = [f"{stack[-2]}.{stack[-1]}"]
        elif name.startswith("TUPLE"):
            n = int(name[5:]) if name[5:] else 0
            items = stack[len(stack) - n :] if n else since_mark()
            del stack[len(stack) - n :]
            stack.append(tuple(items))
        elif name == "REDUCE":
            stack[-2:] = [made(stack[-2], stack[-1])]
        elif name == "BUILD":
            stack.pop()  # the dtype's byte order; sizes are read from the bytes
        elif name == "SETITEMS":
            items = since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"a pickle of counters has no {name}")
    raise ValueError(f"{path.name} ends early")
