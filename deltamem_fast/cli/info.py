"""``deltamem info``: what is installed, and how a model's layers run."""

from __future__ import annotations

import argparse
import json

from ..display import columns
from ..errors import ArgumentError
from ..model.loading import DTYPES, load_patched


def add_command(commands) -> None:
    """Add ``info`` to argparse's ``commands``."""
    info = commands.add_parser(
        "info",
        help="versions, devices and backends; of a model: which layers run on which path, and why",
        description="Without MODEL: versions, devices, and the backend that each would use. With MODEL: loads it, "
        "patches it, and says how each layer's attention runs (fast: the fused forward; generic: the class's own, "
        "with the reason).",
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help="a model's directory or hub id, or smollm2")
    info.add_argument("--adapter", help="a directory or hub id (default: smollm2's own; else fresh parameters)")
    info.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as saved")
    info.add_argument("--device", default="cpu", help="where the model is put (default: %(default)s)")
    info.add_argument("--json", action="store_true", help="one JSON object")
    info.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.model is None and arguments.adapter is not None:
        raise ArgumentError("--adapter: given without MODEL, which it belongs to")
    from ..inspection.facts import environment, format_facts, model_facts

    if arguments.model is None:
        facts, as_text = environment(), format_environment
    else:
        options = {"dtype": arguments.dtype, "device": arguments.device, "tokenizer": False}
        model, _ = load_patched(arguments.model, arguments.adapter, **options)
        facts, as_text = model_facts(model), format_facts
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))
    return 0


def format_environment(facts: dict) -> str:
    """The facts of ``environment()`` as text."""
    rows = [*facts["versions"].items(), ("platform", facts["platform"])]
    for device in facts["devices"]:
        capability = f", capability {device['capability']}" if device["capability"] else ""
        rows.append((f"device {device['device']}", f"{device['name']}{capability}; backend {device['backend']}"))
    kernels = facts["kernels"]
    note = f" ({kernels['note']})" if kernels["note"] else ""
    rows.append(("Triton kernels", (", ".join(kernels["available"]) or "none") + note))
    return "\n".join(columns(rows, (0, 1)))
