"""Rules of the recurrence for properties to draw: every mode and kind of gates, with and without a guard."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from deltamem_kernels.rule import DeltaRule

# beta_max, keep_max, value_max: none, each alone, all three. Each holds a good part of random gates and values.
GUARDS = ((1.0, 1.0, math.inf), (0.4, 0.7, 1.0), (0.3, 1.0, math.inf), (1.0, 0.6, math.inf), (1.0, 1.0, 0.5))


def drawn_rules(ranks: Sequence[int], heads: Sequence[int], guards: Sequence[tuple] = GUARDS) -> st.SearchStrategy:
    """Rules of these ranks and numbers of heads; raw keys, which have no guard, are drawn as well."""

    def rule(rank, heads, mode, row_gates, coupled, normalize, guard):
        return DeltaRule(rank, heads, mode, row_gates, coupled, normalize, *(guard if normalize else ()))

    return st.builds(
        rule,
        st.sampled_from(ranks),
        st.sampled_from(heads),
        st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
        row_gates=st.booleans(),
        coupled=st.booleans(),
        normalize=st.booleans(),
        guard=st.sampled_from(guards),
    )
