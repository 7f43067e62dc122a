"""Over-long examples: found before the first step, named by file and line, never cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.utils.data import Subset

from ..errors import ArgumentError
from .data import Example
from .episode import Episode

OVER_LONG = ("error", "skip")
_SHOWN = 10


@dataclass(frozen=True)
class OverLong:
    """An example that does not fit. ``part`` is ``write`` or ``read``; lengths in tokens."""

    where: str
    part: str
    tokens: int
    limit: int

    def __str__(self) -> str:
        return f"{self.where}: the {self.part} part has {self.tokens:,} tokens, --{self.part}-length {self.limit:,}"


@dataclass(frozen=True)
class Checked:
    """What a look at every example found.

    Attributes:
        examples: those that fit.
        over_long: those that do not.
        empty_writes: how many of ``examples`` write nothing, whatever kind of episode they are.
        write_tokens, read_tokens: of ``examples``, as they stand in the file.
    """

    examples: Sequence[Example]
    over_long: list[OverLong]
    empty_writes: int
    write_tokens: int
    read_tokens: int

    def __str__(self) -> str:
        left_out = f", {len(self.over_long):,} over-long ones left out" if self.over_long else ""
        empty = f", {self.empty_writes:,} of them without a write context" if self.empty_writes else ""
        return (
            f"{len(self.examples):,} examples{empty}; {self.write_tokens:,} tokens to write, {self.read_tokens:,} to "
            f"read{left_out}"
        )


def check_lengths(
    examples: Sequence[Example],
    build: Callable[[Example, str], Episode],
    *,
    write_length: int,
    read_length: int,
    over_long: str = "error",
    kinds: Iterable[str] = ("both",),
    progress: Callable[[Iterable], Iterable] = lambda numbers: numbers,
) -> Checked:
    """Tokenise every example once and compare it with the limits.

    Args:
        examples: all of them.
        build: (example, kind) → Episode.
        write_length, read_length: the limits, in tokens.
        over_long: ``error`` raises if an example is over-long, ``skip`` leaves it out.
        kinds: the kinds of episodes that training may draw; an example has to fit as each of them.
        progress: wraps the numbers that are gone through.

    Raises:
        ValueError: over-long examples under ``error``, or nothing left under ``skip``; or an example that the chat
            template refuses. The message names file and line.
    """
    found: list[OverLong] = []
    kept: list[int] = []
    empty = write_tokens = read_tokens = 0
    for place in progress(range(len(examples))):
        example = examples[place]
        # Most examples show one turn, and are the same state-only.
        episodes = [build(example, k) for k in kinds if k != "state_only" or example.state_only() is not example]
        parts = (
            OverLong(example.where, "write", max(len(e.write_ids) for e in episodes), write_length),
            OverLong(example.where, "read", max(len(e.read_ids) for e in episodes), read_length),
        )
        beyond = [part for part in parts if part.tokens > part.limit]
        if beyond:
            found.append(beyond[0])
            continue
        kept.append(place)
        empty += not any(episode.writes for episode in episodes)
        write_tokens += len(episodes[0].write_ids)
        read_tokens += len(episodes[0].read_ids)
    if found and (over_long == "error" or not kept):
        shown = "; ".join(str(item) for item in found[:_SHOWN])
        more = f"; and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
        raise ArgumentError(
            f"data: {len(found):,} of {len(examples):,} examples are over-long: {shown}{more}; allowed: larger limits, "
            "or --over-long skip if that leaves any"
        )
    return Checked(Subset(examples, kept), found, empty, write_tokens, read_tokens)
