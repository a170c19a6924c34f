"""Labelled text for the demo model, taken from Debian, npm and generated arithmetic.

``extract`` downloads the packages named in SOURCES with the ordinary clients (apt-get, npm), unpacks them without
installing, and returns documents of about 2,400 bytes with a label and a fixed train/held-out split.
The split is by digest of the document, and repeated documents are kept once, so that no held-out text is trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

DOCUMENT_BYTES = 2_400  # of UTF-8, so that documents of every language cost about as many tokens
HELD_OUT_OF_256 = 8  # a document is held out where the first byte of its digest is below this: about 3 %


@dataclass(frozen=True)
class Source:
    """One package: where a domain's text comes from and under what licence its text stands."""

    domain: str
    registry: str
    package: str
    licence: str
    read: Callable[[Path], Iterator[str]]
    limit: int = 9_000_000  # characters kept, so that no domain dwarfs the rest


@dataclass(frozen=True)
class Document:
    """A piece of text with its domain, source package and split ("train" or "held-out")."""

    text: str
    domain: str
    package: str
    split: str


class _Visible(HTMLParser):
    """Text of a help page; block tags become line breaks."""

    BLOCKS = frozenset({"p", "div", "h1", "h2", "h3", "h4", "li", "tr", "br", "td", "th"})
    HIDDEN = frozenset({"script", "style", "head", "nav", "footer", "header", "select", "button"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def _help_pages(pattern: str | None) -> Callable[[Path], Iterator[str]]:
    """Reader of LibreOffice help. ``pattern`` keeps lines of the language and drops untranslated ones."""

    def read(root: Path) -> Iterator[str]:
        for page in sorted(root.rglob("*.html")):
            parser = _Visible()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            lines = (" ".join(x.split()) for x in "".join(parser.pieces).splitlines())
            kept = [x for x in lines if len(x.encode()) > 12 and (pattern is None or re.search(pattern, x))]
            if len(kept) > 2:
                yield "\n".join(kept[1:])

    return read


def _austen(root: Path) -> Iterator[str]:
    """Strings of an R lazy-load database: length-prefixed zlib blocks holding XDR character vectors."""
    raw = next(root.rglob("data/Rdata.rdb")).read_bytes() + next(root.rglob("R/janeaustenr.rdb")).read_bytes()
    for start in (m.start() for m in re.finditer(b"\x78[\x01\x5e\x9c\xda]", raw)):
        try:
            block = zlib.decompressobj().decompress(raw[start:])
        except zlib.error:
            continue
        lines, at = [], 0
        while (at := block.find(b"\x00\x04\x00\x09", at)) >= 0:
            (length,) = struct.unpack(">i", block[at + 4 : at + 8])
            if 0 <= length < 400:
                lines.append(block[at + 8 : at + 8 + length].decode("latin-1"))
                at += 8 + length
            else:
                at += 4
        if len(lines) > 1_000:
            yield "\n".join(lines)


def _sword(root: Path) -> Iterator[str]:
    """Chapters of a SWORD zText module: the .bzs index gives offset and size of each zlib block in .bzz."""
    for index in sorted(root.rglob("*.bzs")):
        packed = index.with_suffix(".bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            text = zlib.decompress(packed[offset : offset + size]).decode("utf-8", errors="replace")
            text = re.sub(r"<note.*?</note>|<[^>]+>", " ", text, flags=re.S)
            text = re.sub(r"[ \t]+", " ", text.replace("\x00", "")).strip()
            yield re.sub(r"(?<=[.!?”]) (?=[A-Z“])", "\n", text)


def _files(*patterns: str) -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        for pattern in patterns:
            for path in sorted(root.rglob(pattern)):
                if path.is_file() and "test" not in path.parts and "encodings" not in path.parts:
                    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                    yield raw.decode("utf-8", errors="ignore")

    return read


def _compat_data(root: Path) -> Iterator[str]:
    """The features of the browser compatibility tables, indented two spaces as the project's own sources are."""
    whole = json.loads(next(root.rglob("data.json")).read_text(encoding="utf-8"))
    for area in ("api", "css", "html", "javascript", "svg"):
        for name, feature in whole[area].items():
            yield json.dumps({name: feature}, indent=2, ensure_ascii=False)


def arithmetic(seed: int = 0, documents: int = 2_600) -> Iterator[str]:
    """Generated arithmetic: sums, differences, products and sequences of small numbers, one per line."""
    rng = random.Random(seed)
    for _ in range(documents):
        lines = []
        for _ in range(110):
            a, b, kind = rng.randint(0, 99), rng.randint(0, 99), rng.randrange(4)
            if kind == 0:
                lines.append(f"{a} + {b} = {a + b}")
            elif kind == 1:
                lines.append(f"{a + b} - {b} = {a}")
            elif kind == 2:
                lines.append(f"{a % 13} * {b % 13} = {(a % 13) * (b % 13)}")
            else:
                lines.append(", ".join(str(a + i * (b % 10)) for i in range(7)))
        yield "\n".join(lines)


MPL = "MPL-2.0"
SOURCES = (
    Source("english", "debian", "r-cran-janeaustenr", "public domain text (package: MIT)", _austen),
    Source("english", "debian", "sword-text-web", "public domain text (World English Bible)", _sword),
    Source("french", "debian", "libreoffice-help-fr", MPL, _help_pages(r"[éèàùçêîô]|\b(le|la|les|des|une)\b")),
    Source("russian", "debian", "libreoffice-help-ru", MPL, _help_pages(r"[а-яА-Я]{3}")),
    Source("chinese", "debian", "libreoffice-help-zh-cn", MPL, _help_pages(r"[\u4e00-\u9fff]{2}")),
    Source("python", "debian", "libpython3.11-stdlib", "PSF-2.0", _files("*.py")),
    Source("python", "debian", "libpython3.11-minimal", "PSF-2.0", _files("*.py")),
    Source("c", "npm", "better-sqlite3", "public domain (SQLite amalgamation; package: MIT)", _files("sqlite3.c")),
    Source("latex", "debian", "texlive-latex-base-doc", "LPPL-1.3c and similar free licences", _files("*.tex", "*.tex.gz")),
    Source("latex", "debian", "texlive-latex-recommended-doc", "LPPL-1.3c and similar free licences", _files("*.tex", "*.tex.gz")),
    Source("json", "npm", "@mdn/browser-compat-data", "CC0-1.0", _compat_data),
)


def fetch(source: Source, folder: Path) -> tuple[Path, str]:
    """Download and unpack a package below ``folder``; returns (its folder, the archive's file name).

    Raises CalledProcessError where the client fails, RuntimeError where it brings no archive.
    """
    archives, root = folder / "archives", folder / source.package.replace("/", "_")
    archives.mkdir(parents=True, exist_ok=True)
    stem = source.package.lstrip("@").replace("/", "-")
    if not list(archives.glob(f"{stem}[_-][0-9]*")):
        client = ["apt-get", "download", "-qq"] if source.registry == "debian" else ["npm", "pack", "--silent"]
        subprocess.run([*client, source.package], cwd=archives, check=True, stdout=subprocess.DEVNULL)
    found = sorted(archives.glob(f"{stem}[_-][0-9]*"))
    if not found:
        raise RuntimeError(f"no archive of {source.package} came from the {source.registry} client")
    if not root.exists():
        root.mkdir()
        unpack = ["dpkg", "-x", str(found[-1]), str(root)]
        if source.registry == "npm":
            unpack = ["tar", "-xzf", str(found[-1]), "-C", str(root)]
        subprocess.run(unpack, check=True)
    return root, found[-1].name


def documents_of(text: str) -> Iterator[str]:
    """Cut text into documents of about DOCUMENT_BYTES, at line ends."""
    piece: list[str] = []
    for line in text.splitlines(keepends=True):
        piece.append(line)
        if len("".join(piece).encode()) >= DOCUMENT_BYTES:
            yield "".join(piece)
            piece = []
    if len("".join(piece).encode()) > DOCUMENT_BYTES // 8:
        yield "".join(piece)


def split_of(text: str) -> str:
    """ "held-out" or "train", from the text alone."""
    return "held-out" if hashlib.sha256(text.encode()).digest()[0] < HELD_OUT_OF_256 else "train"


def extract(folder: Path) -> tuple[list[Document], list[dict[str, object]]]:
    """All documents, and one record per source: domain, package, archive, licence, characters."""
    seen: set[bytes] = set()
    documents: list[Document] = []
    records: list[dict[str, object]] = []
    generated = Source("math", "generated", "data/corpora.py", "generated", lambda _: arithmetic())
    for source in (*SOURCES, generated):
        root, archive = (folder, "-") if source.registry == "generated" else fetch(source, folder)
        kept = 0
        for text in (piece for whole in source.read(root) for piece in documents_of(whole)):
            digest = hashlib.sha256(re.sub(r"\s+", " ", text).encode()).digest()
            if digest in seen or kept > source.limit:
                continue
            seen.add(digest)
            kept += len(text)
            documents.append(Document(text, source.domain, source.package, split_of(text)))
        if kept == 0:
            raise RuntimeError(f"package {source.package} gave no text: its layout changed, see {source.read}")
        records.append({"domain": source.domain, "registry": source.registry, "package": source.package,
                        "archive": archive, "licence": source.licence, "characters": kept})  # fmt: skip
    return documents, records
