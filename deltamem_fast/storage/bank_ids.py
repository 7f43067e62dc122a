"""The ids of a bank's memories, and the error that names those that have moved on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..arguments import shown
from ..errors import ArgumentError, ArgumentTypeError, ConflictError

MAX_ID_BYTES = 512


class BankConflict(ConflictError):
    """A write was refused because entries are not at the versions that it was made on; nothing was written.

    Attributes:
        moved: id → (version it was made on, version found); 0 is "not there".
    """

    def __init__(self, moved: Mapping[str, tuple[int, int]]):
        self.moved = dict(moved)
        named = (
            f"{id!r} (made on {_entry_at(made)}, found {_entry_at(found)})" for id, (made, found) in self.moved.items()
        )
        super().__init__(
            f"ids: {first_of(named)} moved on, so nothing was written; gather again and repeat the turn (or overwrite)"
        )

    def __reduce__(self):
        return BankConflict, (self.moved,)

    @property
    def ids(self) -> list[str]:
        """The ids that moved on, in the order of the write."""
        return list(self.moved)


def _entry_at(version: int) -> str:
    return f"version {version}" if version else "no entry"


def first_of(texts: Iterable[str], most: int = 5) -> str:
    """At most so many texts for a message, and how many more there are."""
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def check_ids(ids: Iterable[str], name: str = "ids") -> list[str]:
    """``ids`` as a list.

    Raises:
        TypeError: not an iterable of strings.
        ValueError: one is empty, longer than 512 bytes of UTF-8, holds NUL or half of a surrogate pair, or comes twice.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ArgumentTypeError(f"{name}: got a {type(ids).__name__}, allowed a list of strings")
    try:
        ids = list(ids)
    except TypeError as error:  # such as a tensor of no dimension
        raise ArgumentTypeError(f"{name}: got a {type(ids).__name__}, allowed a list of strings") from error
    if not _plain(ids):
        for id in ids:
            check_id(id, name)
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(id for id in ids if id in seen or seen.add(id))
        raise ArgumentError(f"{name}: got {twice!r:.80} twice, allowed each once")
    return ids


def _plain(ids: list[str]) -> bool:
    """Whether ids are sure to be allowed, each by itself; all of them at one look, for they come by hundreds."""
    if set(map(type, ids)) != {str}:
        return False
    text, sizes = "".join(ids), set(map(len, ids))
    return text.isascii() and "\0" not in text and 1 <= min(sizes) and max(sizes) <= MAX_ID_BYTES


def check_id(id: str, name: str = "id") -> str:
    """``id`` itself; errors as ``check_ids``."""
    if not isinstance(id, str):
        raise ArgumentTypeError(f"{name}: got {shown(id)}, a {type(id).__name__}, allowed strings")
    try:
        size = len(id.encode())
    except UnicodeEncodeError:
        raise ArgumentError(f"{name}: got {id!r:.80}, which holds half of a surrogate pair") from None
    if not 1 <= size <= MAX_ID_BYTES or "\0" in id:
        raise ArgumentError(f"{name}: got {shown(id)} of {size} bytes, allowed 1 to {MAX_ID_BYTES} bytes without NUL")
    return id


def after(prefix: str) -> str | None:
    """The first string in order of code points behind all that begin with ``prefix``; None if there is none."""
    for last in range(len(prefix) - 1, -1, -1):
        point = ord(prefix[last]) + 1
        point = 0xE000 if 0xD800 <= point <= 0xDFFF else point
        if point <= 0x10FFFF:
            return prefix[:last] + chr(point)
    return None
