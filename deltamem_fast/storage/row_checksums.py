"""Checksums of a bank's rows: of the bytes, and of whose they are and since when."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Sequence

import numpy

_AT_ONCE = 64  # rows that are computed together


def row_sums(ids: Sequence[str], versions: Sequence[int], rows: numpy.ndarray) -> list[int]:
    """A checksum for each of ``rows``, uint8 [B, bytes], contiguous; of 63 bits, as SQLite's integers are signed.

    Multilinear hashing: Σ wordₙ · keyₙ modulo 2⁶⁴, of which the upper bits are kept. That sees changes in the lower
    half of a word of 64 bits; a second sum, of the words in the other byte order, sees those in the upper half. Other
    bytes have both sums with a chance of about 2⁻³⁰, whatever the change. A batch's rows take half the time of CRC-32.
    """
    whole, rest = divmod(rows.shape[1], 8)
    if rest:
        padded = numpy.zeros((len(rows), 8 * (whole + 1)), numpy.uint8)
        padded[:, : rows.shape[1]] = rows
        rows = padded
    words = rows.view("<u8")
    keys = _keys(words.shape[1])
    lower = numpy.einsum("ij,j->i", words, keys[0]) >> 32
    upper = numpy.einsum("ij,j->i", words.view(">u8"), keys[1]) >> 33
    sums = (lower | upper << 32).astype(numpy.int64).tolist()
    return [found ^ zlib.crc32(f"{version} {id}".encode()) for found, version, id in zip(sums, versions, ids)]


def sums_of_buffers(ids: Sequence[str], versions: Sequence[int], rows: Sequence) -> list[int]:
    """``row_sums`` of rows that are buffers of one size each, anywhere."""
    sums: list[int] = []
    for start in range(0, len(ids), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        block = numpy.frombuffer(b"".join(rows[some]), numpy.uint8).reshape(len(rows[some]), -1)
        sums += row_sums(ids[some], versions[some], block)
    return sums


@functools.lru_cache(maxsize=4)
def _keys(words: int) -> numpy.ndarray:
    """uint64 [2, words], random numbers that are the same everywhere."""
    return numpy.frombuffer(hashlib.shake_128(b"rows of a bank").digest(16 * words), "<u8").reshape(2, words)


def row_crc(id: str, version: int, row: bytes) -> int:
    """The checksum of a row as of version 2 of the file."""
    return zlib.crc32(row, zlib.crc32(f"{version} {id}".encode()))
