"""Clients that ask without a pause, for a time: requests, tokens, how long they wait; then each memory's replay."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from pathlib import Path

from ..instrument import commands, results
from ..instrument.rows import Row, measured
from . import replay
from .clients import Server, User, refused, sayings
from .kills import CLOSE
from .process import ServerProcess, add_engine, engine_of, named

DIRECTORY = results.DIRECTORY / "serving" / "load"
DTYPE = "float32"  # in which a batch's memories can be compared with those of one row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.serving load``."""
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer at most (default: %(default)s)")
    parser.add_argument("--replays", type=int, default=64, help="memories that are replayed (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", help="a directory, or smollm2 (default: %(default)s)")
    parser.add_argument("--adapter", help="a directory (default: the shipped one)")
    add_engine(parser)
    parser.add_argument("--address", help="of a server that runs, instead of one that is started here")


def run(options: argparse.Namespace) -> int:
    """Ask, compare, print, write."""
    from deltamem_fast.model.known import default_adapter

    adapter = options.adapter or default_adapter(options.model)
    if adapter is None:
        raise ValueError("--adapter: not given")
    users = [User(f"user-{n}") for n in range(options.clients)]
    with tempfile.TemporaryDirectory() as folder:
        process = None
        if options.address is None:
            bank = str(Path(folder) / "users.bank")
            arguments = [options.model, "--adapter", adapter, "--bank", bank, "--dtype", DTYPE]
            process = ServerProcess([*arguments, *engine_of(options)])
        address = options.address or process.address
        with Server(address, "") as server:
            model = json.loads(server.request("GET", "/v1/models")[1])["data"][0]["id"]
        with process or contextlib.nullcontext():
            began = time.perf_counter()
            ask(users, address, model, options.seconds, options.answer)
            took = time.perf_counter() - began
            with Server(address, model) as server:
                files = {user.name: server.exported(user.name) for user in users[: options.replays] if user.turns}
                versions = {user.name: server.version(user.name) for user in users}
            if process is not None:
                process.end()
    row = row_of(options, users, took, versions, files, adapter)
    quick = (options.clients, options.seconds) != (64, 120.0)
    return commands.finish([row], {"quick": quick}, options.output)


def ask(users: list[User], address: str, model: str, seconds: float, answer: int) -> None:
    """Let every user say one thing after another, each in a thread, until the time is over."""
    until = time.perf_counter() + seconds

    def talk(user: User) -> None:
        texts = iter(sayings(user.name, 10_000))
        with Server(address, model) as server:
            while time.perf_counter() < until and not user.errors:
                try:
                    server.say(user, next(texts), answer)
                except Exception as error:
                    user.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=talk, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def row_of(options, users: list[User], took: float, versions: dict, files: dict, adapter: str) -> Row:
    """What came of it; refused, if there was an error or a memory is not its replay."""
    from deltamem_fast.model.loading import load_patched

    model, tokenizer = load_patched(options.model, adapter, dtype=DTYPE)
    far = {}
    for user in [user for user in users[: options.replays] if user.turns]:
        wanted = replay.replayed(model, tokenizer, user.turns, options.answer)
        far[user.name] = replay.distance(replay.loaded(model, files[user.name]), wanted)
    turns = [turn for user in users for turn in user.turns]
    tokens = sum(len(tokenizer(turn.reply["content"])["input_ids"]) for turn in turns)
    errors = refused(users)
    errors += [f"{user.name}: at {versions[user.name]}, not {user.version}" for user in users
               if versions[user.name] != user.version]  # fmt: skip
    errors += [f"{name}: {distance:.1e} from its replay" for name, distance in far.items() if not distance <= CLOSE]
    server = "another" if options.address else named(options)
    parameters = {
        "server": server,
        "model": Path(options.model).name,
        "clients": options.clients,
        "seconds": options.seconds,
    }
    row = measured(
        "load/request", parameters, [turn.seconds for turn in turns], requests=len(turns),
        requests_per_second=len(turns) / took, tokens_per_second=tokens / took, errors=len(errors),
        distance=max(far.values()), replayed=len(far),
    )  # fmt: skip
    if errors:
        row.status, row.note = "refused", "; ".join(errors[:5])
    return row
