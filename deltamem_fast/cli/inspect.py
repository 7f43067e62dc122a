"""``deltamem inspect``: what a memory file holds, and what a text writes to it and reads from it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..display import counted, number, printable
from ..errors import ArgumentError
from ..memory.figures import distance, report, rows_of
from ..memory.file import MemoryContent, read_memory
from ..memory.state import MemoryState
from ..model.known import default_adapter
from ..model.loading import DTYPES, load_model, load_patched
from ..storage.files import as_path
from .given import add_text, given_memory, given_text

TOP = 8


def add_command(commands) -> None:
    """Add ``inspect`` to argparse's ``commands``."""
    inspect = commands.add_parser(
        "inspect",
        help="look inside a memory file: figures, distances, what a text writes and reads, pictures",
        description="Prints norm, effective rank, saturation and largest row of every layer and head; with OTHER how "
        "far the two memories are apart; with a text which of its tokens wrote and read most, starting from the "
        "memory. No model is needed but for a text. Neither file is changed.",
    )
    inspect.add_argument("memory", metavar="MEMORY", help="a memory file (safetensors)")
    inspect.add_argument("other", metavar="OTHER", nargs="?", help="another one, to compare with")
    add_text(inspect)
    inspect.add_argument("--tokens", action="store_true", help="the text's figures token by token")
    inspect.add_argument("--model", help="a model's directory, hub id, or smollm2 (the demo's, if MEMORY is of it)")
    inspect.add_argument("--adapter", help="the adapter's directory or hub id; goes with --model")
    inspect.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as saved")
    inspect.add_argument("--device", default="cpu", help="where the model is put (default: %(default)s)")
    inspect.add_argument(
        "--row", type=int, metavar="N", help="one conversation of the file, from 0 (default: all in the figures; 0 in "
        "pictures, page and for a text)"
    )  # fmt: skip
    inspect.add_argument("--html", metavar="PAGE", help="write one HTML file with everything in it")
    inspect.add_argument(
        "--png",
        metavar="FILE",
        help="heat maps of the states; for a text also layers × tokens, in FILE with -tokens added",
    )
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    inspect.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    text = _text_of(arguments)
    _check_outputs(arguments, text is not None)
    file = read_memory(arguments.memory, "MEMORY")
    other = None if arguments.other is None else read_memory(arguments.other, "OTHER")
    rows_of(file.layers, arguments.row, "--row")
    if other is not None:
        rows_of(other.layers, arguments.row, "--row: OTHER")
    found = {"report": report(file.layers, file.skipped, arguments.row)}
    if other is not None:
        try:
            found["distance"] = distance(file.layers, other.layers, arguments.row)
        except ValueError as error:
            raise ArgumentError(f"OTHER: {str(error).removeprefix('b: ')}") from error
    if text is not None or arguments.html or arguments.png:
        rows_of(file.layers, arguments.row or 0, "--row")
    if text is not None:
        found["text"] = _trace(arguments, file, text)
    written = _write_pictures(arguments, file, other, found.get("text"))
    if arguments.json:
        names = {key.removesuffix("_name"): said for key, said in file.names.items()}
        figures = {name: value.to_dict() for name, value in found.items()}
        facts = {"file": str(file.path), **names, "rows": file.rows, "frozen": file.frozen, **figures}
        print(json.dumps(facts | {"written": [str(path) for path in written]}, indent=2))
    else:
        print(_format(arguments, file, other, found))
        if written:
            print("\n" + "\n".join(f"wrote {path}" for path in written))
    return 0


def _check_outputs(arguments: argparse.Namespace, with_text: bool) -> None:
    """Raise if a page or picture would take the place of a file that is read, or of one another."""
    given = {"MEMORY": arguments.memory, "OTHER": arguments.other, "--text-file": arguments.text_file}
    taken = {os.path.realpath(as_path(path, name)): name for name, path in given.items() if path is not None}
    given = {"--html": arguments.html, "--png": arguments.png}
    outputs = [(name, as_path(path, name)) for name, path in given.items() if path is not None]
    if arguments.png is not None and with_text:
        outputs.append(("--png", _beside(Path(arguments.png))))
    for name, path in outputs:
        owner = taken.get(os.path.realpath(path))
        if owner is not None:
            raise ArgumentError(f"{name}: would write {path}, which is {owner}; allowed another file")
        taken[os.path.realpath(path)] = name


def _beside(picture: Path) -> Path:
    """Where the picture of a text's tokens goes."""
    return picture.with_name(f"{picture.stem}-tokens{picture.suffix}")


def _text_of(arguments: argparse.Namespace) -> str | None:
    """The text, or None; refuses arguments that have no meaning without one."""
    if arguments.text is None and arguments.text_file is None:
        for name in ("tokens", "model", "adapter"):
            if getattr(arguments, name):
                raise ArgumentError(f"--{name}: given without --text or --text-file, which it belongs to")
        return None
    if arguments.adapter is not None and arguments.model is None:
        raise ArgumentError("--adapter: given without --model, which it belongs to")
    if arguments.model is not None and arguments.adapter is None and default_adapter(arguments.model) is None:
        raise ArgumentError("--model: given without --adapter; a memory fits one adapter only")
    return given_text(arguments)


# --- the model for a text


def _trace(arguments: argparse.Namespace, file: MemoryContent, text: str):
    from ..inspection.trace import trace
    from ..model.threads import fitting_threads

    if arguments.model is None:
        model, tokenizer = _shipped(arguments, file)
    else:
        options = {"dtype": arguments.dtype, "device": arguments.device}
        model, tokenizer = load_patched(arguments.model, arguments.adapter, "--model", **options)
    memory = given_memory(file.path, model)
    with fitting_threads(model):
        return trace(model, tokenizer, text, memory.select([arguments.row or 0]))


def _shipped(arguments: argparse.Namespace, file: MemoryContent):
    """The demo's backbone with the adapter that the file was made with; an error that names the right one if none."""
    from ..adapter.identity import describe_difference
    from ..adapter.record import identity_of
    from ..model.patch import patch_model, unpatch_model
    from ..recall.weights import find_weights

    unknown = ArgumentError(
        f"--model: not given, and MEMORY was not made with the demo's weights but with {file.made_with}; pass --model "
        "and --adapter"
    )
    try:
        weights = find_weights()
    except FileNotFoundError as error:
        raise unknown from error
    options = {"dtype": arguments.dtype, "device": arguments.device}
    model, tokenizer = load_model(str(weights.backbone), local=True, quiet=True, **options)
    for adapter in weights.adapters.values():
        patch_model(model, adapter)
        difference = describe_difference(file.fingerprints, identity_of(model).fingerprints())
        if not difference:
            return model, tokenizer
        if difference.startswith("backbone"):
            break
        unpatch_model(model)
    raise unknown


# --- what is written and printed


def _write_pictures(arguments, file: MemoryContent, other: MemoryContent | None, trace) -> list[Path]:
    row = arguments.row or 0
    written = []
    if arguments.html:
        from ..inspection.page import write_page

        said = file.names
        names = {"File": file.path.name, "Adapter": said["adapter_name"], "Backbone": said["backbone_name"]}
        for state in list(file.layers.values())[:1]:
            heads, rank = state.shape[1:3]
            names["Memory"] = f"{counted(len(file.layers), 'layer')}, {counted(heads, 'head')}, rank {rank}"
        if file.rows > 1:
            names["Conversation"] = f"{row} of 0 to {file.rows - 1}"
        written.append(
            write_page(
                arguments.html,
                _memory(file),
                trace=trace,
                other=None if other is None else _memory(other),
                other_name="" if other is None else _other_name(file, other),
                title=f"Inside {file.path.name}",
                facts=names,
                row=row,
            )
        )
    if arguments.png:
        from ..inspection.pictures import draw_heat_map, draw_trace, snapshot

        shots = [snapshot(file.layers, file.path.stem, row)]
        shots += [snapshot(trace.memory, "after the text")] if trace is not None else []
        shots += [snapshot(other.layers, _other_name(file, other), row)] if other is not None else []
        try:
            written.append(draw_heat_map(shots, Path(arguments.png)))
            if trace is not None:
                written.append(draw_trace(trace, _beside(Path(arguments.png))))
        except ImportError as error:
            raise ArgumentError(f"--png: {error}") from error
    return written


def _memory(file: MemoryContent):
    """Of no model: it can be looked at, but no model takes it as its own."""
    return MemoryState(file.layers, frozen=file.frozen, skipped=file.skipped)


def _other_name(file: MemoryContent, other: MemoryContent) -> str:
    # The folder's name tells two of one name apart; the whole path is nobody's business.
    return other.path.stem if other.path.stem != file.path.stem else f"{other.path.parent.name}/{other.path.name}"


def _format(arguments, file: MemoryContent, other: MemoryContent | None, found: dict) -> str:
    lines = [printable(str(file.path))]
    for kind in ("adapter", "backbone"):
        lines.append(f"{kind:<10}{printable(file.names[f'{kind}_name'])} ({file.names[f'{kind}_fingerprint'][:12]})")
    rank = max((state.shape[-1] for state in file.layers.values()), default=0)
    kind = "read-only" if file.frozen else "writable"
    lines += [f"holds     {counted(file.rows, 'conversation')}, rank {rank}, {kind}", "", str(found["report"])]
    if other is not None:
        lines += ["", f"Distance to {printable(str(other.path))}", str(found["distance"])]
    if "text" in found:
        lines += ["", *_format_text(found["text"], arguments.tokens)]
    return "\n".join(lines)


def _format_text(trace, by_token: bool) -> list[str]:
    lines = []
    if trace.frozen:
        lines.append("The memory is read-only: the text writes nothing.")
    for measure, words in (("writes", "Wrote most (gate × error)"), ("reads", "Read most")):
        entries = trace.top(measure, TOP)
        lines.append(f"{words}, over all layers and heads:" if entries else f"{words}: nothing")
        sizes = [number(entry.size) for entry in entries]
        width = max(map(len, sizes), default=0)
        for entry, size in zip(entries, sizes):
            first, last = entry.positions[0], entry.positions[-1]
            place = f"token {first}" if first == last else f"tokens {first}-{last}"
            lines.append(f"  {size:>{width}}  '{printable(entry.text)}'  {place}")
    return [*lines, "", str(trace)] if by_token else lines
