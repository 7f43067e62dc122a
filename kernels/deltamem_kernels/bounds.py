"""How large a state can get, whatever tokens come: a bound for every rule, with its proof.

Row i of S obeys s ← κ s − ε (s · k) k + ω v k with ‖k‖ = 1. Let c be the cosine of the angle between s and k:

    ‖s'‖² = κ² ‖s‖² + 2 κ c ‖s‖ (ω v − ε c ‖s‖) + (ω v − ε c ‖s‖)²

an upward or downward parabola in c. Where 2κ > ε it is highest at c* = ω v (κ − ε) / (‖s‖ ε (2κ − ε)), if that is a
cosine at all, and there ‖s'‖² = κ² ‖s‖² + ω² v² κ² / (ε (2κ − ε)); else at c = ±1, where ‖s'‖ = |κ − ε| ‖s‖ + ω |v|.
So the worst step is a function f(‖s‖): convex, as the largest of norms of what is affine in ‖s‖; at 0 ω |v|; at last
as steep as max(κ, |κ − ε|). If that is below 1, f crosses ‖s‖ at one place M, and M |v| is never passed: f is convex,
so on [0, M] at most the larger of f(0) and f(M), and f(0) = ω |v| is no more than f(M), which c = 0 shows.
``fixed_point`` is M:

    ω κ / √(ε (2κ − ε) (1 − κ²))    if c* is a cosine there,    else    ω / (1 − |κ − ε|)

It is the largest, not only a bound: from two dimensions on, an adversary who knows s chooses k at the angle of c*, and
comes as close to M as he likes. Gates differ from token to token; M of the worst of them holds for all. It grows with β
in every rule (``row_bound`` says where in λ it is largest).
"""

from __future__ import annotations

import math

from .rule import DeltaRule


def fixed_point(keep: float, erase: float, write: float) -> float:
    """M: the largest ‖s_i‖ ÷ |v| that one gate setting, token after token, leads to; inf where there is none.

    Args:
        keep, erase, write: κ, ε and ω, each 0 to 1.
    """
    if write == 0:
        return 0.0
    if keep >= 1 or abs(keep - erase) >= 1:
        return math.inf
    if 2 * keep > erase > 0:
        found = write * keep / math.sqrt(erase * (2 * keep - erase) * (1 - keep * keep))
        if abs(write * (keep - erase)) <= found * erase * (2 * keep - erase):
            return found
    return write / (1 - abs(keep - erase))


def worst_step(size: float, keep: float, erase: float, write: float) -> float:
    """f: the largest ‖s_i‖ ÷ |v| after a token, with ``size`` before it."""
    along = abs(keep - erase) * size + write
    if 2 * keep > erase > 0 and size > 0 and abs(write * (keep - erase)) <= size * erase * (2 * keep - erase):
        turned = (keep * size) ** 2 + (write * keep) ** 2 / (erase * (2 * keep - erase))
        return max(along, math.sqrt(turned))
    return along


def row_bound(rule: DeltaRule) -> float:
    """The largest ‖s_i‖ ÷ max |v_i| of any row i of any state, however many tokens come; inf where it has no bound.

    A state starts from 0, or within the bound. ``rule`` without a guard: β and λ anywhere in [0, 1], as float32's
    sigmoid rounds them.

    With λ of its own, the worst λ is 0 (then k turns the state round: β / (1 − β)) or the largest one: between them
    ``fixed_point`` falls, then rises. In ``lambda_outside``, where erase ≤ keep, it only rises.
    """
    if not rule.normalize:
        return math.inf
    beta, keep = rule.beta_max, rule.keep_max
    if rule.coupled and rule.mode != "no_lambda":
        keep = min(keep, 1 - beta)
    keeps = [keep]
    if not rule.coupled and rule.mode == "standard":
        keeps.append(0.0)
    return max(fixed_point(k, k * beta if rule.mode == "lambda_outside" else beta, beta) for k in keeps)
