"""Which message or text moved a session's memory how far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..arguments import check_share, check_type, shown
from ..display import number, table
from ..errors import ArgumentError

KEPT = 1024  # moves that a session remembers; older ones are counted
MOST_SOURCE = 200  # characters
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Move:
    """What one message, or one text that the memory was given, did. ``system``: what stands before the first message.

    Attributes:
        turn: how many turns there were before it.
        source: its role, or what was done: ``ingest``, ``revise``, ``forget``; a text's own name may follow.
        message: its place in ``MemorySession.messages``; None: it is none of them.
        tokens: how many went through the model.
        trust: how far it was trusted, 0 to 1.
        moved: ‖S − S₀‖ ÷ max(‖S₀‖, ‖S‖), the mean over heads and layers; see ``trusting.moved``.
    """

    turn: int
    source: str
    message: int | None
    tokens: int
    trust: float
    moved: float


@dataclass(frozen=True)
class Audit:
    """The newest moves of a memory, oldest first, and how many earlier ones are not kept. ``print`` it to read it."""

    moves: tuple[Move, ...] = ()
    dropped: int = 0

    def __iter__(self):
        return iter(self.moves)

    def __len__(self) -> int:
        return len(self.moves)

    def with_moves(self, *moves: Move) -> Audit:
        """This audit and more; at most ``KEPT``."""
        found = (*self.moves, *moves)
        gone = max(0, len(found) - KEPT)
        return Audit(found[gone:], self.dropped + gone)

    def largest(self, count: int = 10) -> Audit:
        """The moves that went farthest, the farthest first."""
        return Audit(tuple(sorted(self.moves, key=lambda move: -move.moved)[:count]), self.dropped)

    def newest(self, count: int = 10) -> Audit:
        """The last moves, oldest first."""
        return Audit(self.moves[max(0, len(self.moves) - count) :], self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object."""
        return {"moves": [list(dataclasses.astuple(move)) for move in self.moves], "dropped": self.dropped}

    def __str__(self) -> str:
        headings = ["turn", "source", "message", "tokens", "trust", "moved"]
        rows = [
            [str(m.turn), m.source, "-" if m.message is None else str(m.message), str(m.tokens), number(m.trust),
             number(m.moved)]
            for m in self.moves
        ]  # fmt: skip
        end = f"\n{self.dropped} earlier moves are not kept" if self.dropped else ""
        return (table(headings, rows, left=(1,)) if rows else "nothing has moved the memory") + end


NOTHING_MOVED = Audit()


def audit_from(value: Mapping[str, Any]) -> Audit:
    """The audit that ``to_dict`` gave, checked before (``schema``)."""
    return Audit(tuple(Move(*move) for move in value["moves"]), value["dropped"])


def checked_trust(trust: Any) -> dict[str, float]:
    """A session's trust by role.

    Raises:
        TypeError, ValueError: no mapping of ``ROLES`` to numbers from 0 to 1.
    """
    trust = {} if trust is None else trust
    check_type(trust, "trust", Mapping, f"a dict of {', '.join(ROLES)} to numbers from 0 to 1, or None")
    for role, value in trust.items():
        if role not in ROLES:
            raise ArgumentError(f"trust: got role {shown(role)}, allowed {', '.join(ROLES)}")
        check_share(value, f"trust[{role!r}]")
    return {role: float(value) for role, value in trust.items()}


def checked_source(source: Any) -> str:
    """The name of a text, one line of at most ``MOST_SOURCE`` characters."""
    if not isinstance(source, str) or not source.isprintable() or len(source) > MOST_SOURCE:
        raise ArgumentError(
            f"source: got {shown(source)}, allowed a printable text of at most {MOST_SOURCE} characters"
        )
    return source
