"""The kind of a token: read off its text, counted over a run, and no more than chance on random routing."""

import unicodedata
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from analysis.token_classes import CLASSES, by_class, class_codes, prose_example, text_codes, token_class, whole_words
from analysis.trace import Trace
from tests.synthetic import PLAIN, make_part, make_trace

KINDS = {
    "newlines": ["\n", "\n\n    ", " \r\n", "\n\t"],
    "spaces": [" ", "    ", "\t", "\u00a0", "\u3000"],
    "digits": ["7", " 2024", "٣", "1,000", "½", "-5"],
    "punctuation": [".", " ->", "):\n", "「", "\\", "$", "</", "🙂"],
    "word starts": [" the", " Élan", " при", " x1", "\tif"],
    "word parts": ["ing", "The", "self.", "é", "слово", "x1", "\\begin", "\\x41", "<div>"],
    "ideographs": ["的", "软件", "かな", "한국", " 中", "Ａ"],
    "parts of characters": ["\\xe4\\xb8", " \\xf0\\x9f", "\\x80"],
    "special tokens": ["<|endoftext|>", "<s>", "</s>", "<pad>", "[CLS]", "<BOS>"],
    "empty tokens": [""],
}


@pytest.mark.parametrize("kind", CLASSES)
def test_token_classes(kind: str) -> None:
    assert [token_class(text) for text in KINDS[kind]] == [kind] * len(KINDS[kind])


def test_text_of_ascii_is_looked_at_as_any_other() -> None:
    """Every pair of characters below 128: letters found by their Unicode class, as outside ASCII."""
    for text in (f"{chr(a)}{chr(b)}" for a in range(128) for b in range(128)):
        letters = any(unicodedata.category(c).startswith("L") for c in text)
        if text.isspace():
            expected = "newlines" if "\n" in text or "\r" in text else "spaces"
        elif letters:
            expected = "word starts" if text[0].isspace() else "word parts"
        else:
            expected = "digits" if any(unicodedata.category(c) == "Nd" for c in text) else "punctuation"
        assert token_class(text) == expected, repr(text)


def test_texts_are_classed_together_as_one_by_one() -> None:
    """Every text of one or two characters below 128 and those of KINDS, between nulls; also of a slice, and of none."""
    texts = [None, *(t for kind in KINDS.values() for t in kind), *map(chr, range(300)), None, *(f"{chr(a)}{chr(b)}" for a in range(128) for b in range(128)),
             " <s>", "<S>", "a[SEP]", "[SEP]x", " \\xe4", "\\xE4", "x\x80", "", None, " "]  # fmt: skip
    expected = [-1 if t is None else CLASSES.index(token_class(t)) for t in texts]
    assert set(expected) == set(range(-1, len(CLASSES)))
    for type_ in (pa.string(), pa.large_string()):
        array = pa.array(texts, type_)
        assert text_codes(array).tolist() == expected and text_codes(array)[:0].tolist() == text_codes(array[:0]).tolist()
        assert all(text_codes(array[a:b]).tolist() == expected[a:b] for a, b in ((1, 40), (40, 41), (350, 9_000), (16_000, None)))


def of_text(layers: tuple = PLAIN, seed: int = 0) -> Trace:
    texts = [" the", "ing", "\n", "7", ";"]
    return make_trace(layers, [make_part(layers, [80] * 8, seed, texts=texts)])


def test_classes_of_a_run() -> None:
    trace = of_text()
    names = [token_class(t) for t in trace.tokens["token"].to_pylist()]
    assert [CLASSES[c] for c in class_codes(trace)] == names
    found = by_class(trace, 0)
    assert found.groups == ("newlines", "digits", "punctuation", "word starts", "word parts")
    experts = trace.experts(0)
    for g, group in enumerate(found.groups):
        mine = np.array(names) == group
        assert found.tokens[g] == mine.sum() and found.count[g].tolist() == [int((experts[mine] == e).any(1).sum()) for e in range(8)]


def test_tokens_of_unknown_text_have_no_class() -> None:
    part = make_part(PLAIN, [3])
    column = part.tokens.schema.get_field_index("token")
    texts = pa.array([" a", None, "\n"]).cast(part.tokens.schema.field(column).type)
    trace = make_trace(PLAIN, [replace(part, tokens=part.tokens.set_column(column, part.tokens.schema.field(column), texts))])
    assert class_codes(trace).tolist() == [CLASSES.index("word starts"), -1, CLASSES.index("newlines")]
    assert by_class(trace, 0).tokens.tolist() == [1, 1]


def test_random_routing_prefers_no_class() -> None:
    """30 random runs: 1.5 false claims expected, 7 or more has odds of 1 : 1,000."""
    assert sum(bool(by_class(of_text(seed=s), 0).significant.any()) for s in range(30)) < 7


def test_a_newcomer_is_shown_a_whole_word_of_prose() -> None:
    assert whole_words([" str", "ength", " of", " the", ".", " x1", "word"]).tolist() == [False, False, True, True, False, False, False]
    lengths, texts = [6, 6, 6], ["**", " the", " str", "ength", " city", "\n"]
    part = make_part(PLAIN, lengths, texts=["x"])
    words = ["**", "#", "ing", "7", " of", "(", *texts, *[" word"] * 6]
    tokens = part.tokens.set_column(part.tokens.schema.get_field_index("token"), part.tokens.schema.field("token"),
                                    pa.array(words).dictionary_encode().cast(part.tokens.schema.field("token").type))  # fmt: skip
    trace = make_trace(PLAIN, [replace(part, tokens=tokens)])
    assert prose_example(trace) == (2, 0)  # by the share of whole words
    labels = pa.array(["sql", "English", "english"])
    documents = trace.documents.set_column(trace.documents.schema.get_field_index("label"), "label", labels)
    assert prose_example(replace(trace, documents=documents)) == (1, 4)  # by label; " the" is short, " str" only begins a word
