"""A server from its arguments: model, bank, engine, and uvicorn around them."""

from __future__ import annotations

import argparse
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn

from ..errors import ArgumentError, FileMissingError, file_error
from ..memory.bank import MemoryBank
from ..model.known import default_adapter, known_directory
from ..model.loading import device_for, load_patched
from ..model.threads import fitting_threads
from ..recall.weights import find_weights
from ..storage.files import as_path, state_home
from .app import make_app
from .engine import Engine
from .jobs import Limits
from .metrics import Metrics

_DEFAULT, _STRATEGY, _SMALL_WORLD = "smollm2", "msw", "small-world"
_PATIENCE = 30  # seconds that answers under way have when the server is to end


def serve(arguments: argparse.Namespace, key: str | None, threads: int | None) -> int:
    """Serve until a signal ends it.

    Args:
        arguments: of ``deltamem serve``, checked.
        key: the bearer token, or None.
        threads: of PyTorch, or None = as many as fit the model.

    Raises:
        ValueError, OSError: an argument that is wrong; the message names it.
    """
    name, loading = chosen(arguments)
    with listen(arguments.host, arguments.port) as listening:
        device = arguments.device or device_for(arguments.backend)
        loading |= {"device": device, "dtype": arguments.dtype, "backend": arguments.backend}
        loading["guard"] = arguments.guard
        model, tokenizer = load_patched(**loading)
        path = bank_path(arguments.bank, name)
        with MemoryBank(path, model) as bank, fitting_threads(model, threads):
            engine = Engine(model, tokenizer, bank, name, limits_of(arguments), Metrics())
            try:
                run(engine, key, listening, path)
            finally:
                engine.close()
    return 0


class _Server(uvicorn.Server):
    """A server that, when it is told to end, says so to those whose requests were not begun."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._engine.refuse()
        super().handle_exit(sig, frame)


def limits_of(arguments: argparse.Namespace) -> Limits:
    """What is taken."""
    given = arguments
    return Limits(
        given.max_batch,
        given.max_batch_tokens,
        given.max_waiting,
        given.max_tokens,
        given.answer_tokens,
        given.max_body,
        given.trust,
        given.budget,
    )


def chosen(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What requests call the model, and what is loaded: ``name`` and ``adapter`` of ``load_patched``.

    Raises:
        ValueError: no adapter is given, and the model has none.
    """
    name, loading = _choice(arguments.model, arguments.adapter)
    return arguments.name or name, loading


def _choice(model: str | None, adapter: str | None) -> tuple[str, dict[str, Any]]:
    if model is None:
        if adapter is not None:
            raise ArgumentError("--adapter: given without MODEL, which it belongs to")
        try:
            known_directory(_DEFAULT, local=True)
        except (OSError, ImportError):
            found = find_weights()
            return _SMALL_WORLD, {"name": str(found.backbone), "adapter": str(found.adapters[_STRATEGY])}
        model = _DEFAULT
    adapter = default_adapter(model) if adapter is None else adapter
    if adapter is None:
        raise ArgumentError("--adapter: not given; fresh parameters remember nothing of use")
    return Path(model).name or model, {"name": model, "adapter": adapter}


def bank_path(given: str | None, name: str) -> Path:
    """Where the memories lie: as given, or in the state home.

    Raises:
        ValueError, OSError: that is no path, or there is no home.
    """
    if given:
        return as_path(given, "--bank")
    try:
        return state_home() / "deltamem" / f"{name}.bank"
    except RuntimeError as error:
        raise FileMissingError(f"--bank: not given, and there is no home to keep it in ({error})") from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        ValueError, OSError: there is no such address, or it is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror as error:
        raise ArgumentError(f"--host: got {host!r}: {error.strerror}") from error
    except OSError as error:
        raise file_error(error, "--host, --port", f"{host}:{port}") from error


def run(engine: Engine, key: str | None, listening: socket.socket, path: Path) -> None:
    """Serve an engine until a signal ends it; answers under way have half a minute then.

    Args:
        path: of the bank, which is told.
    """
    config = uvicorn.Config(
        make_app(engine, key), log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{engine.name} at http://{shown}:{port}/v1, memories in {path}", flush=True)
    # uvicorn hands a signal on when it has ended; it is over by then.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, engine).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
