"""run.json: what ran on what, which rows were left out and why, and what was verified."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.record import identity_of, is_patched
from ..arguments import shown
from ..errors import ArgumentError, FileFormatError
from ..inspection.facts import versions
from ..storage.files import check_format, check_version, read_bytes, read_json, write_json
from .answers import differing
from .checking import Equality
from .data import Document
from .paper import PAPER_TASKS
from .plan import Plan
from .policies import Policy
from .tasks import TASKS, digest_of

RUN_FORMAT, RUN_VERSION = "deltamem evaluation run", 1
VERIFIED = "verified"
# What a row's answers do not depend on, but its costs do; of the settings, and of the run.
FED = ("batch", "chunk")
MEASURED = ("versions", "commit", "dirty", "processor", "cores", "device", "threads", "time")
_SAMPLED = 64  # numbers of a weight
_PACKAGES = ("lm_eval", "bm25s", "nltk", "sentence-transformers")


def common_facts(plan: Plan, documents: Mapping[str, Sequence[Document]]) -> dict[str, Any]:
    """What all rows of a directory have in common."""
    files = {
        name: PAPER_TASKS[name].data if path is None else hashlib.sha256(read_bytes(path, f"task {name}")).hexdigest()
        for name, path in plan.tasks
        if name in PAPER_TASKS
    }
    return {
        "model": plan.shown.get(plan.model, plan.model),
        "adapters": {label: plan.shown.get(name, name) for label, name in plan.adapters.items()},
        "documents": plan.documents,
        "questions": plan.questions,
        "seed": plan.seed,
        "settings": asdict(plan.settings),
        "data": {name: digest_of(found) for name, found in documents.items()} | files,
        "attention": plan.attention,
    }


def read_before(path: Path, common: Mapping[str, Any], judge: str | None = None) -> dict[str, Any]:
    """What ``run.json`` has of an earlier run into the same directory; {} = there was none.

    Args:
        judge: the name of the model that judges. It may come later, and be another: all rows are scored by it then.

    Raises:
        ArgumentError: it was run otherwise: rows of two models or data sets are no comparison.
        FileFormatError: it is no such record, or a damaged one.
    """
    if not path.exists():
        return {}
    before = read_json(path)
    check_format(before.get("format"), RUN_FORMAT, str(path), "not the record of a run")
    check_version(before.get("format_version"), RUN_VERSION, str(path))
    for name, here, there in differing(common, {key: before.get(key) for key in common}):
        added = name.partition(".")[0] in ("data", "adapters") and None in (here, there)  # a task or adapter more
        added |= name == "weights" and there is None  # an older run, of which they are not known
        added |= name == "settings.embedder" and None in (here, there)  # rows of dense retrieval, or others
        if not added and name not in {f"settings.{fed}" for fed in FED}:
            raise ArgumentError(
                f"{name:.200}: got {shown(here)}, but {path} has {shown(there)}; give another --output, or what it has"
            )
    for name, (fits, allowed) in _GONE_ON_WITH.items():
        if name in before and not fits(before[name]):
            raise FileFormatError(f"{path}: {name}: got {shown(before[name])}, allowed {allowed}")
    if judge is None and before.get("judge") is not None:
        raise ArgumentError(
            f"judge: got none, but {path} has {shown(before['judge'])}, which has scored the rows that are there; give "
            "another --output, or a judge, which scores them all"
        )
    return before


def _texts(value: Any, kind: type = dict) -> bool:
    return isinstance(value, kind) and all(isinstance(one, str) for one in (value.values() if kind is dict else value))


def _by_row(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value is task → row → what ``fits``."""
    return isinstance(value, dict) and all(
        isinstance(rows, dict) and all(map(fits, rows.values())) for rows in value.values()
    )


# What of an earlier record goes into the next one as it is, so that a damaged one must not get there.
_GONE_ON_WITH: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("adapters", "data", "tasks"), (_texts, "an object of texts")),
    "settings": (lambda value: isinstance(value, dict) and isinstance(value.get("embedder"), str | None), "an object"),
    "policies": (lambda value: _texts(value, list), "a list of texts"),
    "left_out": (lambda value: _by_row(value, lambda reason: isinstance(reason, str)), "rows and reasons by task"),
    "verified": (lambda value: _by_row(value, _says_whether), "rows by task, each with holds true or false"),
}


def _says_whether(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("holds")) is bool


def weights_digest(model: nn.Module) -> str:
    """sha256 over each weight's name, shape, dtype and up to 64 of its numbers: of another checkpoint it is another.

    A model of many gigabytes is not read through for it.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        numbers = weight.detach().reshape(-1)
        some = numbers[:: max(1, numbers.numel() // _SAMPLED)][:_SAMPLED].cpu().contiguous()
        found.update(f"{name} {list(weight.shape)} {weight.dtype} ".encode() + some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Record:
    """run.json: what ran on what, which rows were left out and why, and what was verified."""

    def __init__(self, plan: Plan, model: nn.Module, common: dict[str, Any], measured: Mapping[str, Any]):
        self.path = plan.output / "run.json"
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        common = common | {"dtype": dtype, "weights": weights_digest(model)}
        before = read_before(self.path, common, plan.judge)
        titles = {name: TASKS[name].title if name in TASKS else PAPER_TASKS[name].title for name, _ in plan.tasks}
        device = next(model.parameters()).device
        more = {name: {**before.get(name, {}), **common[name]} for name in ("adapters", "data")}
        self.found: dict[str, Any] = {
            "format": RUN_FORMAT,
            "format_version": RUN_VERSION,
            **common,
            **more,
            "settings": common["settings"] | {"embedder": common["settings"]["embedder"] or _embedder(before)},
            "judge": plan.judge,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tasks": {**before.get("tasks", {}), **titles},
            "policies": list(dict.fromkeys([*before.get("policies", []), *(policy.name for policy in plan.policies)])),
            "versions": versions() | {package: _version(package) for package in _PACKAGES},
            "backend": plan.backend,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **measured,
            "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "left_out": before.get("left_out", {}),
            VERIFIED: before.get(VERIFIED, {}),
        }
        self.write()

    def head(self, task: str, row: str, policy: Policy, model: nn.Module, data: str | None = None) -> dict[str, Any]:
        """Of a file of answers; ``data`` is the digest of what is asked, None = as the run has it."""
        adapter = identity_of(model).fingerprints() if is_patched(model) else None
        deciding = ("model", "dtype", "seed", "attention")
        head = {"task": task, "row": row, "policy": policy.name, "adapter": adapter}
        head |= {name: self.found[name] for name in deciding} | {"data": data or self.found["data"].get(task)}
        settings = dict(self.found["settings"])
        described = {name: self.found[name] for name in MEASURED if name in self.found}
        described["fed"] = {name: settings.pop(name) for name in FED}
        if policy.kind != "dense":
            settings["embedder"] = None
        return head | {"settings": settings} | described

    def leave_out(self, task: str, row: str, reason: str) -> None:
        """Note why a row has no figures."""
        self.found["left_out"].setdefault(task, {})[row] = reason
        self.write()

    def verified(self, task: str, row: str, found: Equality) -> None:
        """Note how far a row's way of feeding lies from plain forwards."""
        self.found[VERIFIED].setdefault(task, {})[row] = asdict(found) | {"holds": found.holds}
        self.write()

    def write(self) -> None:
        """To disk."""
        write_json(self.path, self.found)


def _embedder(before: Mapping[str, Any]) -> str | None:
    return before.get("settings", {}).get("embedder")


def feeding_holds(output: Path, plan: Plan) -> bool:
    """Whether what was verified of a plan's rows, in this run or before, equals plain forwards."""
    verified = read_json(output / "run.json").get(VERIFIED, {})
    rows = [verified.get(task, {}).get(row) for task, _ in plan.tasks for row in plan.rows()]
    return all(row["holds"] for row in rows if row is not None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
