"""Episodes of the recall proof's world, as the JSON lines that ``deltamem train`` takes.

An episode tells facts (some overwritten later, small talk between them) and asks for one of them in a context of its
own. In a fifth of the episodes the newer half of the facts stays in sight; one question in twenty is for small talk,
whose answer must stay what the backbone says.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from deltamem_fast.recall import task
from deltamem_fast.storage.files import write_text


def draw_episode(random: Random, most_facts: int) -> dict:
    """One line: ``write``, ``read`` and ``answer``; names of the training texts alone."""
    facts = task.draw_facts(random, random.randint(1, most_facts), held_out=False)
    seen: list[task.Fact] = []
    if len(facts) > 1 and random.random() < 0.2:
        facts, seen = facts[: len(facts) - len(facts) // 2], facts[len(facts) - len(facts) // 2 :]
    told, holds = task.telling(random, facts, held_out=False, distractors=0.2, updates=0.1)
    if random.random() < 0.05:
        read = task.small_talk(random, held_out=False, most=1)
    else:
        visible = task.grouped(random, [fact.statement(random) for fact in seen], 4)
        read = [*visible, *task.asking(random, [random.choice([*holds, *seen])])]
    return {"write": told, "read": read[:-1], "answer": read[-1]["content"]}


def write_episodes(path: str | os.PathLike, count: int, seed: int, most_facts: int) -> Path:
    """A file of ``count`` episodes of 1 to ``most_facts`` facts; the same for the same seed."""
    random = Random(seed)
    lines = (json.dumps(draw_episode(random, most_facts)) + "\n" for _ in range(count))
    return write_text(Path(path), "".join(lines), private=False)
