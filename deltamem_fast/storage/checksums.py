"""Checksums of a bank's rows and entries, of 63 bits: SQLite's integers are signed."""

from __future__ import annotations

import hashlib
import struct
import zlib

from xxhash import xxh3_64_intdigest

_pack = struct.Struct("<6Q").pack  # takes integers of 64 bits that are not negative, and nothing else


def row_sum(id: str, version: int, row: bytes | memoryview) -> int:
    """XXH3 of a row's bytes, and of whose they are and since when; a tenth of the time of CRC-32."""
    return xxh3_64_intdigest(row, xxh3_64_intdigest(id.encode(), version)) >> 1


def entry_sum(id: str, key: int, version: int, size: int, created: int, updated: int, row_sum: int) -> int:
    """XXH3 of an entry.

    Raises:
        struct.error: a number that is none, or negative.
    """
    return xxh3_64_intdigest(_pack(key, version, size, created, updated, row_sum) + id.encode()) >> 1


# --- of earlier versions of the file


def row_sum_2(id: str, version: int, row: bytes) -> int:
    """As of version 2."""
    return zlib.crc32(row, zlib.crc32(f"{version} {id}".encode()))


def row_sum_3(id: str, version: int, row: bytes) -> int:
    """As of version 3: Σ wordₙ · keyₙ modulo 2⁶⁴ of the words in either byte order, the upper bits."""
    import numpy  # here alone: what opens a file of today starts without it

    padded = row + bytes(-len(row) % 8)
    keys = numpy.frombuffer(hashlib.shake_128(b"rows of a bank").digest(2 * len(padded)), "<u8").reshape(2, -1)
    lower, upper = (
        int(numpy.einsum("j,j->", numpy.frombuffer(padded, of), own)) for of, own in zip(("<u8", ">u8"), keys)
    )
    return (lower >> 32 | upper >> 33 << 32) ^ zlib.crc32(f"{version} {id}".encode())


def entry_sum_2(id: str, *values: int) -> int:
    """As of versions 2 and 3."""
    return zlib.crc32(" ".join(map(str, (*values, id))).encode())
