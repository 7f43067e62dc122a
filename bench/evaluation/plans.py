"""Plans that are run into one directory, with what a result has to say of where it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from deltamem_fast.eval.plan import Plan
from deltamem_fast.eval.policies import policy_named
from deltamem_fast.eval.record import feeding_holds
from deltamem_fast.eval.run import run

from ..instrument import commands, machine


def policies(*names: str):
    """Policies by their names."""
    return tuple(map(policy_named, names))


def run_all(plans: Sequence[Plan]) -> int:
    """Run plans of one directory, one after the other; each adds its rows. The exit status: 1 if one fails."""
    facts = machine.describe()
    measured = {name: facts[name] for name in ("processor", "cores", "commit", "dirty")}
    say = commands.progress()
    for plan in plans:
        files = run(plan, say=say, measured=measured)
    print("\n".join(str(path) for path in files.values()))
    return int(not all(feeding_holds(plan.output, plan) for plan in plans))
