"""``deltamem convert``: an adapter in another file format."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..adapter.files import (
    FORMATS,
    RELEASED_NAME,
    SAFETENSORS_NAME,
    read_adapter,
    read_weights,
    same_bits,
    write_adapter,
)
from ..config import CONFIG_NAME
from ..errors import ArgumentError
from ..storage.files import as_path


def add_command(commands) -> None:
    """Add ``convert`` to argparse's ``commands``."""
    convert = commands.add_parser("convert", help="rewrite an adapter in another file format, bit for bit")
    convert.add_argument("source", metavar="SOURCE", help="an adapter's directory, or a hub id (owner/name)")
    convert.add_argument("target", metavar="TARGET", help="the directory to write, made if needed")
    convert.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help=f"safetensors: {SAFETENSORS_NAME}; released: {RELEASED_NAME}, as the released code reads it",
    )
    convert.add_argument("--force", action="store_true", help="replace the adapter in a TARGET that is not empty")
    convert.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    """Write the adapter SOURCE into the directory TARGET in another format.

    Raises:
        ValueError: the target is the source, or is not empty and ``force`` is not given; a broken adapter; or what
            was written does not read back bit for bit.
        FileNotFoundError: no adapter there.
    """
    directory = as_path(arguments.target, "TARGET")
    _check_target(as_path(arguments.source, "SOURCE"), directory, arguments.force)
    adapter = read_adapter(arguments.source)
    weights = adapter.weights
    write_adapter(directory, adapter.config, weights, arguments.to, finite=False)
    written = read_weights(directory)
    if written.keys() != weights.keys() or not all(same_bits(written[name], weights[name]) for name in weights):
        raise ArgumentError(f"TARGET: {directory} does not read back as it was written")
    files = [CONFIG_NAME, SAFETENSORS_NAME if arguments.to == "safetensors" else RELEASED_NAME]
    parameters = sum(tensor.numel() for tensor in weights.values())
    size = sum((directory / name).stat().st_size for name in files)
    print(f"{directory}: wrote {' and '.join(files)}")
    print(f"{len(weights):,} tensors, {parameters:,} parameters, {size:,} bytes; read back, bit-equal to the source")
    return 0


def _check_target(source: Path, target: Path, force: bool) -> None:
    if os.path.realpath(target) == os.path.realpath(source):
        raise ArgumentError(f"TARGET: got {target}, which is SOURCE; allowed another directory")
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"TARGET: got {target}, which is a file; allowed a directory")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ArgumentError(f"TARGET: {target} is not empty; --force replaces the adapter in it")
