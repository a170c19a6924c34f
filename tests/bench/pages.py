"""The compressed pages of a Parquet column, as they lie in the file: what any reader has to decompress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

_STRUCT, _BINARY, _BOOLS, _NUMBERS = 12, 8, (1, 2), (5, 6)  # types of Thrift's compact protocol


def pages(path: Path, group: pq.RowGroupMetaData, columns: list[str]) -> Iterator[tuple[bytes, int]]:
    """(compressed bytes, size when decompressed) of each page, dictionaries too, of some columns of a row group."""
    with path.open("rb") as raw:
        for i in range(group.num_columns):
            column = group.column(i)
            if column.path_in_schema in columns:
                raw.seek(column.dictionary_page_offset or column.data_page_offset)
                chunk, at = raw.read(column.total_compressed_size), 0
                while at < len(chunk):
                    header, at = _header(chunk, at)
                    yield chunk[at : at + header[3]], header[2]  # PageHeader: 2 uncompressed, 3 compressed size
                    at += header[3]


def _header(chunk: bytes, at: int) -> tuple[dict[int, int], int]:
    """(the numbers of a struct by field, where it ends)"""
    found, field = dict[int, int](), 0
    while chunk[at]:
        step, kind = divmod(chunk[at], 16)
        field, at = field + step, at + 1
        if kind in _NUMBERS or kind == _BINARY:
            n, at = _number(chunk, at)
            found[field], at = (n >> 1) ^ -(n & 1), at + (n if kind == _BINARY else 0)
        elif kind == _STRUCT:
            _, at = _header(chunk, at)
        elif kind not in _BOOLS:
            raise ValueError(f"a field of type {kind}")
    return found, at + 1


def _number(chunk: bytes, at: int) -> tuple[int, int]:
    n, shift = 0, 0
    while True:
        n, shift, at = n | (chunk[at] & 127) << shift, shift + 7, at + 1
        if chunk[at - 1] < 128:
            return n, at
