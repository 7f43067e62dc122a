"""What recall has to reach, as ratios; a row's standard error is its ``ratio_error``, or its ``error``."""

from __future__ import annotations

from ..instrument.targets import Target
from .perplexity import EVERYTHING, NAME
from .variants import STRATEGIES

HALF = 1.31  # recall with the newer half in the context ÷ the frozen backbone's
GOALS = (
    *(
        Target(f"newer half of the facts in the context, {name} ÷ frozen (the least over 4 to 16 facts)",
               f"half/{name}", HALF, value="ratio")
        for name in STRATEGIES
    ),
    *(
        Target(f"perplexity of held-out text, {name} with {article} {memory} memory ÷ frozen", f"{NAME}/{name}", 0.99,
               parameters={"memory": memory, "text": EVERYTHING}, value="ratio", most=1.01)
        for name in STRATEGIES
        for article, memory in (("an", "empty"), ("a", "filled"))
    ),
)  # fmt: skip
