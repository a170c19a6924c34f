"""What kind of token is it? Whitespace, digits, word starts and others, read off its text; and which kinds an expert serves."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from .reading import Reading, coded_tokens, one_pass
from .specialization import Preferences, group_reading
from .trace import Trace, TraceError

CLASSES = ("newlines", "spaces", "digits", "punctuation", "word starts", "word parts", "ideographs", "parts of characters",
           "special tokens", "empty tokens")  # fmt: skip
_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<(?:pad|unk|bos|eos|mask)>|\[(?:CLS|SEP|PAD|MASK|UNK)\]", re.I)
PROSE = ("english", "prose", "en")  # labels of running text
EXAMPLE_DOCUMENTS, EXAMPLE_TOKENS = 64, 256  # read in the search for prose
_LETTER = re.compile("[A-Za-z]")
_RAW_BYTE = re.compile(r"\\x[89a-f][0-9a-f]")


@lru_cache(maxsize=2**18)  # a vocabulary: every site asks for the same texts
def token_class(text: str) -> str:
    """The kind of a token's readable text, one of CLASSES.

    Word starts carry the space before the word; a word at a line's start or after a bracket therefore counts as a word
    part. Wide letters (Chinese, Japanese, Korean) are ideographs. A token that is not whole characters shows as \\xNN.
    """
    if not text or _SPECIAL.fullmatch(text):
        return "special tokens" if text else "empty tokens"
    if _RAW_BYTE.search(text):
        return "parts of characters"
    if text.isspace():
        return "newlines" if "\n" in text or "\r" in text else "spaces"
    if not (_LETTER.search(text) if text.isascii() else any(c.isalpha() for c in text)):
        return "digits" if any(c.isnumeric() for c in text) else "punctuation"
    if not text.isascii() and any(unicodedata.east_asian_width(c) in "WF" for c in text if c.isalpha()):
        return "ideographs"
    return "word starts" if text[0].isspace() else "word parts"


_LETTER_BIT, _DIGIT, _BREAK, _VISIBLE, _ASK_FIRST, _ASK = (1 << i for i in range(6))


def _held(byte: int) -> int:
    """What a text has that holds the byte; _ASK where only ``token_class`` knows: beyond ASCII, a raw byte's \\xNN, or, at its start, <|end|>, [SEP]."""
    c = chr(byte)
    if byte > 127 or c == "\\":
        return _ASK
    kind = _LETTER_BIT if c.isalpha() else _DIGIT if c.isnumeric() else _BREAK if c in "\r\n" else 0
    return kind | (not c.isspace()) * _VISIBLE | (c in "<[") * _ASK_FIRST


def _kind(held: int) -> str:
    """``token_class`` of a text that has this, _ASK_FIRST standing for a visible start."""
    if not held & _VISIBLE:
        return "newlines" if held & _BREAK else "spaces"
    if not held & _LETTER_BIT:
        return "digits" if held & _DIGIT else "punctuation"
    return "word parts" if held & _ASK_FIRST else "word starts"


_HELD = np.array([_held(b) for b in range(256)], np.uint8)
_KIND = np.array([CLASSES.index(_kind(b)) for b in range(32)], np.int8)


def class_codes(trace: Trace, stream: str = "decoder", progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """int8 [tokens of the stream] into CLASSES; -1 where a token's text is not known. ``progress`` is as for ``one_pass``. Raises TraceError
    without tokens."""
    return coded_tokens(trace, stream, "token", _chunk_codes, progress)


def _chunk_codes(text: pa.Array) -> np.ndarray:
    """int8 [tokens]: ``class_codes`` of texts, each distinct one looked at once."""
    coded = text if pa.types.is_dictionary(text.type) else text.dictionary_encode()
    kinds = np.append(text_codes(coded.dictionary), np.int8(-1))
    return kinds.take(coded.indices.fill_null(-1).to_numpy(zero_copy_only=False))


def text_codes(texts: pa.Array) -> np.ndarray:
    """int8 [texts]: ``token_class`` of each, as its place in CLASSES, -1 for null.

    Read off the bytes of all texts at once where these are ASCII: each part of a run has some 15,000 texts of its own.
    """
    texts = texts.cast(pa.string())
    edges = np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, 4 * texts.offset)
    of = _HELD.take(np.append(np.frombuffer(texts.buffers()[2] or b"", np.uint8, edges[-1]), np.uint8(0)))  # one more, where the last ends
    held, first = np.bitwise_or.reduceat(of, edges)[:-1], of[edges[:-1]]
    codes = _KIND[(held & (_ASK_FIRST - 1)) | (first & _VISIBLE) << 1]
    asked = (held & _ASK > 0) | (first & _ASK_FIRST > 0) | (np.diff(edges) == 0) | texts.is_null().to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(asked).tolist():
        text = texts[i].as_py()
        codes[i] = -1 if text is None else CLASSES.index(token_class(text))
    return codes


def by_class(trace: Trace, site: int, codes: np.ndarray | None = None, progress: Callable[[int, int], None] | None = None) -> Preferences:
    """Preferences of the token classes that occur. Null and cost as in ``by_group``; ``codes`` are class_codes where at hand.

    ``progress`` is told of the site's decisions, as by ``one_pass``."""
    codes = class_codes(trace, trace.layers[site].stream) if codes is None else codes
    return one_pass(trace, site, class_reading(trace, site, *present_classes(codes)), progress=progress)[0]


def class_reading(trace: Trace, site: int, names: Sequence[str], codes: np.ndarray) -> Reading[Preferences]:
    """``by_class`` for a pass that others share; ``names`` and ``codes`` of ``present_classes``."""
    return group_reading(trace, site, "class", names, codes)


def present_classes(codes: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """(the classes that occur, int8 [tokens] into them); ``codes`` of ``class_codes``."""
    present = [i for i in range(len(CLASSES)) if (codes == i).any()]
    place = np.full(len(CLASSES) + 1, -1, np.int8)
    place[present] = np.arange(len(present))
    return tuple(CLASSES[i] for i in present), place[codes]  # -1 stays -1


def whole_words(texts: Sequence[str]) -> np.ndarray:
    """bool [n]: tokens of some following each other that are a word with the space before it, and not only its beginning."""
    kinds = [token_class(t) for t in texts]
    return np.array([k == "word starts" and t.strip().isalpha() and after != "word parts"
                     for t, k, after in zip(texts, kinds, [*kinds[1:], ""], strict=True)], bool)  # fmt: skip


def prose_example(trace: Trace, stream: str = "decoder") -> tuple[int, int]:
    """(document, position) of a word in running text, to show a newcomer: the first whole word of four letters or more.

    The document is the first labelled as one of PROSE, else, of the first EXAMPLE_DOCUMENTS, the one with the largest share of whole
    words; of each the first EXAMPLE_TOKENS tokens are read. Position 0 where there is no such word. Raises TraceError without tokens.
    """
    rows = [r for r in trace.documents.to_pylist() if r["stack"] == stream and r["n_tokens"]]
    named = [r for r in rows if (r["label"] or "").lower() in PROSE][:1]
    read = []
    for row in named or rows[:EXAMPLE_DOCUMENTS]:
        start = row["first_row"]
        tokens = trace.stream_tokens(stream, start, start + min(row["n_tokens"], EXAMPLE_TOKENS), ["token"])
        texts = [t or "" for t in tokens["token"].to_pylist()]
        read.append((row["document"], texts, whole_words(texts)))
    if not read:
        raise TraceError(f"stream {stream!r} of run {trace.name!r} holds no token")
    document, texts, whole = max(read, key=lambda r: r[2].mean())
    long = np.array([len(t.strip()) >= 4 for t in texts])
    return document, int(np.argmax(whole & long if (whole & long).any() else whole))
