"""The model card of the recall weights, from the figures of their training."""

from __future__ import annotations

from pathlib import Path

from deltamem_fast.storage.files import read_json, write_text

_TEXT = """---
license: apache-2.0
library_name: deltamem-fast
language: en
tags: [delta-mem, qwen3, recall]
---

# Recall weights

A backbone that answers from its context and adapters that answer from an r × r memory per layer, for `deltamem demo`
and `make recall`. They know one small world and nothing else: people with codes, objects in places, small talk.

- `backbone/`: Qwen3 architecture, {parameters:,} parameters, 4 layers, hidden 128, float32, {vocabulary} tokens.
  Trained from scratch on generated conversations in which facts are stated and asked for; the loss is on the answers,
  and with weight {other_weight} on all other tokens. The start is structured (bench/recall/train_backbone.py says how
  and why): {first_phase_steps} steps of terse lists until nine answers in ten were right, then {steps} steps of
  conversations. Then it is frozen.
- Adapters, in deltamem-fast's format, each trained on the frozen backbone to answer with no fact in sight:

| adapter | writes | r | parameters | steps | seconds | recall of 1, 2, 4, 8 facts | empty memory |
|---|---|---|---|---|---|---|---|
{rows}

The second number of steps is of those that also show ordinary text, for which the memory is to change nothing
(bench/recall/settle.py). Recall here is the training's own check: 64 conversations, names that occur in no training
text, each fact asked for once in a context of its own.
`make recall` measures more carefully; the README of the repository has its figures.
Seconds are wall time on two CPU cores that were not idle.

Names, codes and places are invented. Every fifth pair of a name's two syllables (an object's two words) is held out:
held-out names appear in no training text of backbone or adapter, the syllables do. The weights are no use outside this
world: words that it lacks are split into letters, and nothing is remembered of them.

Retrain: `python -m bench.recall train --output deltamem_fast/data/recall` after removing these folders (seeds and
options are in the scripts and in each `training.json`); under an hour on two CPU cores; it goes on where
it was stopped.
"""
_WRITES = {"tsw": "every token (TSW)", "ssw": "the mean of each sentence (SSW)", "msw": "every token, 4 states (MSW)"}


def write(directory: Path) -> Path:
    """Write ``directory/README.md`` from the training figures in its folders; returns its path."""
    backbone = read_json(directory / "backbone" / "training.json")
    vocabulary = read_json(directory / "backbone" / "config.json")["vocab_size"]
    folders = sorted(path.parent for path in directory.glob("*/training.json") if path.parent.name != "backbone")
    text = _TEXT.format(
        rows="\n".join(map(_row, folders)), vocabulary=vocabulary, other_weight=backbone["options"]["other_weight"],
        **{name: backbone[name] for name in ("parameters", "first_phase_steps", "steps")},
    )  # fmt: skip
    return write_text(directory / "README.md", text, private=False)


def _row(folder: Path) -> str:
    figures = read_json(folder / "training.json")
    options, recall = figures["options"], figures["recall"]
    shares = ", ".join(f"{recall[count]['memory']:.2f}" for count in recall)
    empty = max(recall[count]["empty"] for count in recall)
    return (
        f"| `{folder.name}/` | {_WRITES[options['strategy']]} | {options['rank']} | {figures['parameters']:,} | "
        f"{options['steps']} + {options['settle_steps']} | {figures['seconds']:.0f} | {shares} | ≤ {empty:.2f} |"
    )
