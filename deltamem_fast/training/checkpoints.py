"""What a run is, which of its checkpoints are whole, and whether a run may go on from one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.files import SAFETENSORS_NAME
from ..adapter.fingerprints import public_label
from ..arguments import MOST, shown
from ..config import CONFIG_NAME
from ..errors import ArgumentError, FileFormatError
from ..storage.files import as_path, read_json, write_json
from .options import CHANGEABLE, TrainingOptions
from .pickles import check_pickles

RUN_NAME = "training.json"
WHOLE_NAME = "checkpoint.json"  # written last: a directory that has it is whole
_PREFIX = "checkpoint-"
_OF_THE_RUN = ("model", "dtype", "data", "episodes_a_step")


@dataclass(frozen=True)
class Run:
    """What makes a run the same run: model, adapter configuration, data and options.

    Attributes:
        model: the backbone's name.
        dtype: the backbone's.
        adapter: the adapter's configuration, as JSON.
        data: SHA-256 of the data files' bytes.
        episodes_a_step: over all devices and forwards.
        options: as JSON.
    """

    model: str
    dtype: str
    adapter: dict[str, Any]
    data: str
    episodes_a_step: int
    options: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Write ``training.json``; it lies beside what is published, so that it has no paths of this machine."""
        options = {name: value for name, value in self.options.items() if name not in ("output", "resume")}
        write_json(directory / RUN_NAME, vars(self) | {"options": options}, private=False)

    def check(self, directory: Path) -> None:
        """Raise ValueError if the run in ``directory`` is another one; names what differs."""
        theirs = read_json(directory / RUN_NAME)
        # Versions before wrote the backbone's path.
        theirs |= {"model": public_label(str(theirs.get("model")))}
        compared = [(name, theirs.get(name), getattr(self, name)) for name in _OF_THE_RUN]
        for part, changeable in (("adapter", frozenset()), ("options", CHANGEABLE)):
            before, now = theirs.get(part, {}), getattr(self, part)
            if not isinstance(before, dict):
                raise FileFormatError(f"{directory / RUN_NAME}: {part}: got {type(before).__name__}, allowed an object")
            names = sorted((before.keys() | now.keys()) - changeable)
            compared += [(name, before.get(name), now.get(name)) for name in names]
        differing = [
            "other data" if name == "data" else f"{name:.80} {shown(before)} (now {shown(now)})"
            for name, before, now in compared
            if before != now
        ]
        if differing:
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise ArgumentError(
                f"resume: {directory} holds a run with {', '.join(differing[:8])}{more}; allowed: the same, or another "
                "--output"
            )


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return all((checkpoint / name).is_file() for name in (WHOLE_NAME, CONFIG_NAME, SAFETENSORS_NAME))


def step_of(checkpoint: Path) -> int:
    """The step that a whole checkpoint was written after.

    Raises:
        ValueError: its file is damaged; OSError: it cannot be read.
    """
    path = checkpoint / WHOLE_NAME
    step = read_json(path).get("step")
    if type(step) is not int or not 0 <= step <= MOST:
        raise FileFormatError(f"{path}: step: got {step!r:.80}, allowed an integer, 0 or more")
    return step


def mark_whole(checkpoint: Path, step: int) -> None:
    """Say that everything of a checkpoint is on the disk."""
    write_json(checkpoint / WHOLE_NAME, {"step": step}, private=False)


def checkpoints_in(output: Path) -> list[Path]:
    """What lies in a directory under a checkpoint's name, whole or not, anybody's."""
    return [path for path in output.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]


def newest_checkpoint(output: Path) -> Path | None:
    """The whole checkpoint of most steps, or None; one whose step cannot be read is not whole."""
    steps = {}
    for path in checkpoints_in(output):
        if is_whole(path):
            with contextlib.suppress(FileFormatError):
                steps[path] = step_of(path)
    return max(steps, key=steps.get, default=None)


def checkpoint_to_resume(options: TrainingOptions) -> Path | None:
    """The checkpoint that a run starts from, or None = from the start.

    Raises:
        ValueError: ``resume`` names no whole checkpoint, or one whose optimizer or random state is damaged or asks for
            code; or there is a run in ``output`` that ``resume`` does not ask to go on with.
    """
    output = Path(options.output)
    if options.resume and options.resume != "auto":
        checkpoint = as_path(options.resume, "resume")
        if not is_whole(checkpoint):
            raise ArgumentError(f"resume: got {checkpoint}, which is no whole checkpoint; allowed auto, or one that is")
        check_pickles(checkpoint)
        return checkpoint
    if options.resume:
        checkpoint = newest_checkpoint(output)
        if checkpoint is not None:
            check_pickles(checkpoint)
        return checkpoint
    if (output / RUN_NAME).is_file():
        raise ArgumentError(
            f"output: {output} holds a training run; --resume goes on with it, or name another directory"
        )
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"output: got {output}, which is a file; allowed a directory")
    return None
