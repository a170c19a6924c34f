import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.untrusted import UNLIMITED, Limits, Prompt, UploadError, paragraphs, read_prompts


def test_each_kind_of_file() -> None:
    assert read_prompts(b"hello\nworld", "a.TXT") == (Prompt("hello\nworld", None, "prompt 1"),)
    csv = b'Text,label,name\n"a, ""b""\nc",x,first\nd,,\n'
    assert read_prompts(csv, "a.csv") == (Prompt('a, "b"\nc', "x", "first"), Prompt("d", None, "prompt 2"))
    lines = b'{"prompt": "a", "domain": "x"}\r\n\n{"text": "\xc3\xa9"}\n'
    assert read_prompts(lines, "a.jsonl") == (Prompt("a", "x", "prompt 1"), Prompt("é", None, "prompt 2"))


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "a.txt", "empty"), (b"  \n ", "a.txt", "empty"), (b"", "a.csv", "no text column"), (b"", "a.jsonl", "empty"),
        (b"x" * 10_000_001, "a.txt", "at most 10,000,000"), (b"ok\n\xff", "a.txt", r"byte 3 \(line 2\)"),
        ("hi".encode("utf-16"), "a.txt", "UTF-16"), (b"x", "a.pdf", "only .txt"), (b"x", "noext", "only .txt"),
        (b"a,b\n1,2\n", "a.csv", "no text column.*2 other"), (b"text,text\n1,2\n", "a.csv", "twice"),
        (b"text,label\nonly\n", "a.csv", "row 2 has 1 fields"), (b'text\n"open', "a.csv", "not valid CSV"),
        (b"text\n" + b"y" * 200_000, "a.csv", "use .jsonl"), (b"text\nok\n\"\"\n", "a.csv", "prompt 2 is empty"),
        (b'{"text": 1}', "a.jsonl", "not a string"), (b"[1]", "a.jsonl", "not a JSON object"), (b"{broken", "a.jsonl", "line 1 is not valid"),
        (b'{"text":"a"}\n{"x":1}', "a.jsonl", "line 2 has no text"), (b"[" * 200_000, "a.jsonl", "line 1"),
        (b'{"text": "\\ud800"}', "a.jsonl", "surrogate"), (b'{"text":"a"}\n' * 1_001, "a.jsonl", "1,001 prompts"),
        (b'{"text":"' + b"z" * 1_000_001 + b'"}', "a.jsonl", "characters"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_sentence(data: bytes, name: str, message: str) -> None:
    with pytest.raises(UploadError, match=message) as caught:
        read_prompts(data, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_corpus_of_ones_own_has_no_limits() -> None:
    lines = [json.dumps({"text": "z" * n}).encode() for n in (1_000_001, *[10_000] * 1_001)]
    assert sum(map(len, lines)) > Limits().bytes
    assert len(read_prompts(b"\n".join(lines), "a.jsonl", UNLIMITED)) == len(lines)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=20))
def test_any_text_survives_jsonl(texts: list[str]) -> None:
    data = "\n".join(json.dumps({"text": t}) for t in texts).encode()
    assert [p.text for p in read_prompts(data, "a.jsonl")] == texts


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.csv", "a.jsonl"]))
def test_arbitrary_bytes_give_prompts_or_an_upload_error(data: bytes, name: str) -> None:
    with contextlib.suppress(UploadError):
        assert read_prompts(data, name, Limits(bytes=200))


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        ("a,b".encode("utf-16-le"), "a.csv", r"NUL character \(line 1\)"),  # UTF-16 without its mark is valid UTF-8
        (b"one\ntwo\0", "a.txt", r"NUL character \(line 2\)"),
        ("hi".encode("utf-32"), "a.txt", "UTF-32"),
        (b'{"text":"a"}\n{"x":1}\n{"text":"b"}\n{bad\n[1]', "a.jsonl", "^line 2 has no text: .* is needed; nor can lines 4, 5 be read$"),
        (b"{bad\n" * 30, "a.jsonl", "^line 1 is not valid JSON; nor can lines 2, 3, 4, 5, 6, 7, 8, 9, 10 and 20 more be read$"),
        (b'{"text":"a","text":"b"}', "a.jsonl", "line 1 names a field twice"),  # a parser would keep the last one only
        (b'{"text":"a","label":"\\ud800"}', "a.jsonl", "surrogate"),
        (b'{"text":"a","name":"\\udc00"}', "a.jsonl", "surrogate"),
        (b'{"text":"a"}\n\n{"text":"b","label":3}', "a.jsonl", "line 3 has a field label"),
        (b'{"text":' + b"9" * 5_000 + b"}", "a.jsonl", "line 1"),
        (b"\x1f\x8b\x08" + b"\0" * 20, "a.jsonl", "byte 1 "),  # gzip, renamed
        (b"text\n" + b"x\n" * 1_001, "a.csv", "1,001 prompts"),
    ],
)
def test_what_a_parser_would_swallow_is_named(data: bytes, name: str, message: str) -> None:
    with pytest.raises(UploadError, match=message):
        read_prompts(data, name)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip), min_size=1, max_size=9))
def test_any_text_survives_csv(texts: list[str], end: str, mark: bytes) -> None:
    import csv
    import io

    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([["id", "TEXT "], *(["1", t] for t in texts)])
    assert [p.text for p in read_prompts(mark + file.getvalue().encode(), "a.csv")] == texts


def test_reading_leaves_the_field_limit_of_the_process_alone() -> None:
    import csv

    before = csv.field_size_limit()
    read_prompts(b"text\nok\n", "a.csv")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"canary\xff"), ("a.csv", b"canary,canary\n1\n"), ("a.jsonl", b"canary"),
                                            ("a.jsonl", b'{"canary": 1}')])  # fmt: skip
def test_errors_never_repeat_the_text(name: str, data: bytes) -> None:
    with pytest.raises(UploadError) as caught:
        read_prompts(data, name)
    assert "canary" not in str(caught.value)


def test_paragraphs_are_prompts_letter_by_letter() -> None:
    text = "\n One.\nStill one.\n\n    def f():\n\t\n \n\u4e09\u3002\n"
    found = paragraphs(text)
    assert [p.text for p in found] == ["\n One.\nStill one.", "    def f():", "\u4e09\u3002\n"]
    assert [(p.name, p.label) for p in found[1:]] == [("paragraph 2", None), ("paragraph 3", None)] and paragraphs(" \n\n ") == ()
    with pytest.raises(UploadError, match="3 paragraphs; at most 2"):
        paragraphs(text, Limits(prompts=2))
