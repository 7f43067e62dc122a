"""Context policies: what of a document the model sees when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import shown
from ..errors import ArgumentError

# name: (what stands behind the dash, in words, or "" = nothing does; what the policy is)
KINDS = {
    "nothing": ("", "the question alone; with a memory: state only"),
    "last": ("tokens", "the last N tokens of the document"),
    "everything": ("", "the whole document, within the length that the model was trained on"),
    "yarn": ("", "the whole document, positions beyond the trained length interpolated by YaRN"),
    "bm25": ("chunks", "the K chunks that BM25 finds for the question"),
    "dense": ("chunks", "the K chunks whose embeddings are nearest to the question's"),
}
NAMES = {f"{name}-{what.upper()}" if what else name: meaning for name, (what, meaning) in KINDS.items()}
ALLOWED = ", ".join(NAMES)
RETRIEVING = ("bm25", "dense")
MOST = 1_000_000


@dataclass(frozen=True)
class Policy:
    """One row of the comparison, but for the memory.

    Attributes:
        kind: one of ``KINDS``.
        amount: tokens or chunks; 0 where the kind has none.
    """

    kind: str
    amount: int = 0

    @property
    def name(self) -> str:
        """As the command line and files have it."""
        return f"{self.kind}-{self.amount}" if self.amount else self.kind

    @property
    def shared(self) -> bool:
        """Whether all questions of a document have the same context."""
        return self.kind in ("last", "everything", "yarn")


def policy_named(text: str) -> Policy:
    """The policy that a name such as ``last-2048``, ``bm25-4`` or ``everything`` stands for.

    Raises:
        ValueError: it is none.
    """
    kind, _, amount = text.partition("-")
    if kind in KINDS:
        if not KINDS[kind][0] and text == kind:
            return Policy(kind)
        if KINDS[kind][0] and amount.isascii() and amount.isdecimal() and len(amount) < 9 and 0 < int(amount) <= MOST:
            return Policy(kind, int(amount))
    raise ArgumentError(f"policy: got {shown(text)}, allowed {ALLOWED}")
