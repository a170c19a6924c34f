"""Files that people upload, or name on the command line, are parsed here: prompts as .txt, .csv or .jsonl. Nothing is cut; what is wrong is an error.

Every UploadError is one sentence that says what and where, and never repeats the file's own text.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

TEXT_COLUMNS = ("text", "prompt", "content")
LABEL_COLUMNS = ("label", "domain")


class UploadError(ValueError):
    """An upload that cannot be used; the message is one clear sentence."""


@dataclass(frozen=True)
class Limits:
    """What an upload may hold."""

    bytes: int = 10_000_000
    prompts: int = 1_000
    line: int = 1_000_000


UNLIMITED = Limits(bytes=sys.maxsize, prompts=sys.maxsize, line=sys.maxsize)  # of files given on the command line: a corpus of one's own


@dataclass(frozen=True)
class Prompt:
    """One document to capture."""

    text: str
    label: str | None
    name: str


def read_prompts(data: bytes, filename: str, limits: Limits = Limits()) -> tuple[Prompt, ...]:
    """Prompts of an uploaded file: .txt is one prompt, .csv and .jsonl one per row. Raises UploadError."""
    if len(data) > limits.bytes:
        raise UploadError(f"the file has {len(data):,} bytes; at most {limits.bytes:,} are taken at once: split it")
    readers = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl}
    reader = readers.get(PurePath(filename.lower()).suffix)
    if reader is None:
        raise UploadError("only .txt, .csv and .jsonl files are read")
    prompts = reader(_decoded(data), limits)
    if len(prompts) > limits.prompts:
        raise UploadError(f"the file has {len(prompts):,} prompts; at most {limits.prompts:,} are taken at once: split it")
    blank = next((i for i, p in enumerate(prompts, 1) if not p.text.strip()), None)
    if not prompts or blank is not None:
        raise UploadError("the file is empty" if len(prompts) < 2 else f"prompt {blank} is empty: remove it or fill it in")
    return tuple(prompts)


def paragraphs(text: str, limits: Limits = Limits()) -> tuple[Prompt, ...]:
    """Every stretch of a text between blank lines as a prompt of its own, letter by letter. Raises UploadError where there are too many."""
    found = [p for p in re.split(r"\n(?:[^\S\n]*\n)+", text) if p.strip()]
    if len(found) > limits.prompts:
        raise UploadError(f"the pasted text has {len(found):,} paragraphs; at most {limits.prompts:,} are taken at once")
    return tuple(Prompt(p, None, f"paragraph {i}") for i, p in enumerate(found, 1))


def _decoded(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UploadError("the file is UTF-16 or UTF-32: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UploadError(f"the file is not UTF-8: byte {error.start:,} (line {line:,}) is not valid; save it as UTF-8") from None
    if "\0" in text:  # valid UTF-8, but no text editor writes it: UTF-16 without its mark looks like this
        line = text[: text.index("\0")].count("\n") + 1
        raise UploadError(f"the file holds a NUL character (line {line:,}): it is UTF-16 or not text; save it as UTF-8")
    return text


def _txt(text: str, limits: Limits) -> list[Prompt]:
    return [Prompt(text, None, "prompt 1")]


def _csv(text: str, limits: Limits) -> list[Prompt]:
    longest = csv.field_size_limit()  # process-wide, so it is read here and never set
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [c.strip().lower() for c in next(rows, [])]
        at = _columns(header)
        prompts: list[Prompt] = []
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) != len(header):
                raise UploadError(f"row {number:,} has {len(row)} fields, the header has {len(header)}")
            prompts.append(_prompt({k: row[i] for k, i in at.items()}, number - 1))
    except csv.Error as error:
        where = f"line {rows.line_num:,}"
        hint = f"a field is over {longest:,} characters: use .jsonl" if "field larger" in str(error) else "check the quotes"
        raise UploadError(f"the file is not valid CSV at {where}: {hint}") from None
    return prompts


def _columns(header: Sequence[str]) -> dict[str, int]:
    """Positions of text, label and name in a CSV header."""
    doubled = next((c for c in header if c and header.count(c) > 1), None)
    if doubled is not None:
        raise UploadError("the header names a column twice")
    text = next((c for c in TEXT_COLUMNS if c in header), None)
    if text is None:
        raise UploadError(f"no text column: the header needs one of {', '.join(TEXT_COLUMNS)} (it has {len(header)} other columns)")
    found = {"text": header.index(text)}
    label = next((c for c in LABEL_COLUMNS if c in header), None)
    if label is not None:
        found["label"] = header.index(label)
    if "name" in header:
        found["name"] = header.index("name")
    return found


def _jsonl(text: str, limits: Limits) -> list[Prompt]:
    """Every line that cannot be read is named, up to ten, the first with its reason."""
    prompts: list[Prompt] = []
    wrong: list[tuple[int, UploadError]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(_fields(line, limits), len(prompts) + 1))
        except UploadError as error:
            wrong.append((number, error))
    if not wrong:
        return prompts
    first, *others = wrong
    more = f"; nor can line{'s' * (len(others) > 1)} {', '.join(f'{n:,}' for n, _ in others[:9])}" if others else ""
    more += f" and {len(others) - 9:,} more" if len(others) > 9 else ""
    raise UploadError(f"line {first[0]:,} {first[1]}{more + ' be read' if others else ''}") from None


def _fields(line: str, limits: Limits) -> dict[str, Any]:
    """text, label and name of one line. Raises UploadError with what the line does wrong, in words that follow its number."""
    if len(line) > limits.line:
        raise UploadError(f"has {len(line):,} characters; at most {limits.line:,} are read")
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except RecursionError:
        raise UploadError("is nested too deeply") from None
    except UploadError:
        raise
    except ValueError:
        raise UploadError("is not valid JSON") from None
    if not isinstance(row, dict):
        raise UploadError("is not a JSON object with a text field")
    text_key = next((c for c in TEXT_COLUMNS if c in row), None)
    if text_key is None:
        raise UploadError(f"has no text: one of the fields {', '.join(TEXT_COLUMNS)} is needed")
    label_key = next((c for c in LABEL_COLUMNS if c in row), None)
    values: dict[str, Any] = {"text": row[text_key]}
    values |= {"label": row[label_key]} if label_key else {}
    values |= {"name": row["name"]} if "name" in row else {}
    wrong = next((k for k, v in values.items() if not isinstance(v, str) and not (v is None and k != "text")), None)
    if wrong is not None:
        raise UploadError(f"has a field {wrong} that is not a string")
    return values


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; the parser alone would keep the last of two equal names and drop the other silently."""
    if len({k for k, _ in pairs}) != len(pairs):
        raise UploadError("names a field twice")
    return dict(pairs)


def _prompt(values: Mapping[str, Any], number: int) -> Prompt:
    try:
        "".join(v for v in values.values() if v).encode("utf-8")
    except UnicodeEncodeError:
        raise UploadError(f"prompt {number:,} holds a lone surrogate, which is no text") from None
    return Prompt(values["text"], values.get("label") or None, values.get("name") or f"prompt {number}")
