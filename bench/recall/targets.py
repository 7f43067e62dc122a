"""What recall has to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..instrument.rows import Row
from .perplexity import EVERYTHING, NAME
from .variants import STRATEGIES

HALF = 1.31  # recall with the newer half in the context ÷ the frozen backbone's


@dataclass(frozen=True)
class Goal:
    """A ratio that lies between two bounds.

    Attributes:
        what: for a reader.
        name, parameters: of the rows; the worst of them counts.
        least, most: the bounds.
        error: the name of the value that holds the standard error.
    """

    what: str
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    least: float = 0.0
    most: float = math.inf
    error: str = "error"

    def _room(self, row: Row) -> float:
        return min(row.values["ratio"] - self.least, self.most - row.values["ratio"])

    def worst(self, rows: Sequence[Row]) -> Row | None:
        """The row that is the nearest to a bound, or the farthest outside; None if none was measured."""
        found = [row for row in rows if row.name == self.name and "ratio" in row.values]
        found = [row for row in found if self.parameters.items() <= row.parameters.items()]
        return min(found, key=self._room, default=None)

    def met(self, row: Row) -> bool:
        """Whether a row's ratio lies within the bounds."""
        return self._room(row) >= 0

    def bounds(self) -> str:
        """As text."""
        return f"≥ {self.least:g}" if self.most == math.inf else f"{self.least:g} to {self.most:g}"


GOALS = (
    *(
        Goal(
            f"newer half of the facts in the context, {name} ÷ frozen (the least over 4 to 16 facts)",
            f"half/{name}", least=HALF, error="ratio_error",
        )
        for name in STRATEGIES
    ),
    *(
        Goal(
            f"perplexity of held-out text, {name} with {article} {memory} memory ÷ frozen",
            f"{NAME}/{name}", {"memory": memory, "text": EVERYTHING}, 0.99, 1.01,
        )
        for name in STRATEGIES
        for article, memory in (("an", "empty"), ("a", "filled"))
    ),
)  # fmt: skip
