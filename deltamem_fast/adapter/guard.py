"""Guard: gates and values held below bounds, so that no text can make a state larger than one of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deltamem_kernels.bounds import row_bound
from deltamem_kernels.rule import DeltaRule

from ..arguments import shown
from ..errors import ArgumentError

WAYS = "'auto', True, False or a Guard"


@dataclass(frozen=True)
class Guard:
    """Bounds that hold whatever is written; docs/trust.md has the proof and what they cost.

    Attributes:
        beta: β is held at or below it. At 1 a state can grow by |v| with every token.
        keep: λ of its own, and the 1 of ``no_lambda``, likewise; at 1 a state can grow with √tokens.
        norm: ‖S‖, Frobenius, of one memory head that starts empty; each of its r rows stays within norm / √r. From any
            other state S₀ on, ‖S‖² stays within ‖S₀‖² + norm². Values v are held at what that takes.

    Raises:
        ValueError: naming the argument.
    """

    beta: float = 0.95
    keep: float = 1 - 2**-12
    norm: float = 512.0

    def __post_init__(self):
        for name, most in (("beta", 1.0), ("keep", 1.0), ("norm", math.inf)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # As float32 has it: 1 − 1e-12 is 1 there.
            if not number or not 0 < value < min(most, 1e38) or not 0 < np.float32(value) < most:
                below = " and less than 1" if most == 1 else ", and finite"
                raise ArgumentError(f"{name}: got {shown(value)}, allowed a number more than 0{below}")

    def rule(self, rule: DeltaRule) -> DeltaRule:
        """The recurrence ``rule`` under this guard.

        Raises:
            ValueError: its keys are raw, of any length, so that nothing bounds it.
        """
        if not rule.normalize:
            raise ArgumentError(
                "guard: got one for an adapter with normalize_qk=false, allowed False: raw keys may have any length, "
                "and nothing bounds what they write"
            )
        own = not rule.coupled or rule.mode == "no_lambda"
        held = dataclasses.replace(rule, beta_max=self.beta, keep_max=self.keep if own else 1.0)
        return dataclasses.replace(held, value_max=self.norm / (math.sqrt(rule.rank) * row_bound(held)))


class Guarding(NamedTuple):
    """What a model does about it: the guarded recurrence of its layers, or None, and whether every forward takes it,
    or only those with less than whole trust."""

    rule: DeltaRule | None = None
    always: bool = False


UNGUARDED = Guarding()


def guarding(guard: Any, rule: DeltaRule) -> Guarding:
    """What ``patch_model``'s argument ``guard`` asks for.

    Raises:
        TypeError, ValueError: it is none of ``WAYS``, or cannot be had for this recurrence.
    """
    if guard is False:
        return UNGUARDED
    if isinstance(guard, str) and guard == "auto":
        return Guarding(Guard().rule(rule) if rule.normalize else None)
    if guard is not True and not isinstance(guard, Guard):
        raise ArgumentError(f"guard: got {shown(guard)}, allowed {WAYS}")
    return Guarding((Guard() if guard is True else guard).rule(rule), always=True)
