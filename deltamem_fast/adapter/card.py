"""The README.md that stands beside an adapter: what the hub reads of it, and names without paths."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import DeltaMemConfig
from ..version import __version__


def front_matter(base_model: str | None) -> list[str]:
    """The lines in front of a card, which the hub reads; ``base_model`` is a hub id or left out."""
    base = [] if base_model is None else [f"base_model: {base_model}"]
    return ["---", "library_name: deltamem-fast", *base, "tags:", "- delta-mem", "---", ""]


def card_of(base_model: str | None, about: str, adapter: str) -> list[str]:
    """The lines that every card begins with: what the adapter is, ``about``, and how ``adapter`` is loaded."""
    return [
        *front_matter(base_model),
        "# A δ-mem adapter",
        "",
        about,
        "",
        "```python",
        "from deltamem_fast import patch_model",
        "",
        f'patch_model(model, "{adapter}")',
        "```",
        "",
    ]


def table_of(title: str, values: Mapping[str, Any]) -> list[str]:
    """Names and values as a table in Markdown."""
    return [f"| {title} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in values.items())]


def adapter_card(config: DeltaMemConfig, base_model: str | None, repo_id: str) -> str:
    """What an adapter is and how it is loaded, as Markdown."""
    values = config.to_dict()
    names = ("rank", "alpha", "num_state_heads", "memory_write_granularity", "delta_heads", "state_update_mode")
    about = f"An online memory{f' for {base_model}' if base_model else ''}, uploaded with deltamem-fast {__version__}."
    table = table_of("configuration", {name: values[name] for name in names})
    return "\n".join([*card_of(base_model, about, repo_id), *table]) + "\n"


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Each file's own name, with as many of the folders above it as tell all of them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    longest = max(map(len, parts), default=0)
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(Path(path)) for path in paths]
