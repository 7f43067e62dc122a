"""Users whose turns interleave, on a server that is killed and started again between and during them."""

from __future__ import annotations

import argparse
import http.client
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ..instrument import commands, results
from ..instrument.rows import Row, counted
from . import replay
from .clients import Server, Turn, User, refused, sayings
from .process import ServerProcess, add_engine, engine_of, named

DIRECTORY = results.DIRECTORY / "serving" / "kills"
CLOSE = 1e-4  # of a memory to its replay: batches round otherwise than one row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.serving kills``."""
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs while turns are had (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer at most (default: %(default)s)")
    parser.add_argument("--model", help="a directory (default: the small backbone in the package)")
    parser.add_argument("--adapter", help="a directory, of --model")
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Serve, kill, compare, print, write."""
    place = {"model": options.model, "adapter": options.adapter, "server": named(options)}
    rows = measure(options.users, options.turns, options.kills, options.answer, **place, more=engine_of(options))
    quick = (options.users, options.turns, options.kills) != (64, 8, 3) or options.model is not None
    return commands.finish(rows, {"quick": quick}, options.output)


def measure(
    users: int,
    turns: int,
    kills: int,
    answer: int,
    model: str | None = None,
    adapter: str | None = None,
    server: str = "deltamem serve",
    more: Sequence[str] = (),
) -> list[Row]:
    """One row: how many turns were had, what was lost or crossed, and how far the memories are from their replays.

    Args:
        model, adapter: directories; None: the small backbone and its adapter in the package.
        server: what the row calls it.
        more: arguments of ``deltamem serve``.
    """
    from deltamem_fast.model.loading import load_patched
    from deltamem_fast.recall.weights import find_weights

    if model is None:
        found = find_weights()
        model, adapter = str(found.backbone), str(found.adapters["msw"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            model,
            "--adapter",
            adapter,
            "--name",
            "model",
            "--bank",
            str(Path(folder) / "users.bank"),
            "--dtype",
            "float32",
            *more,
        ]
        everybody = [User(f"user-{n}") for n in range(users)]
        story = _Story(arguments, everybody, turns, answer, kills)
        try:
            story.tell()
            with Server(story.process.address, "model") as client:
                files = {user.name: client.exported(user.name) for user in everybody if user.turns}
                versions = {user.name: client.version(user.name) for user in everybody}
            status = story.process.end()
        finally:
            story.process.__exit__()
    patched, tokenizer = load_patched(model, adapter, dtype="float32")
    far = [
        replay.distance(
            replay.loaded(patched, files[user.name]), replay.replayed(patched, tokenizer, user.turns, answer)
        )
        for user in everybody
        if user.turns
    ]
    errors = refused(everybody)
    errors += [f"{user.name}: at {versions[user.name]}, not {user.version}" for user in everybody
               if versions[user.name] != user.version]  # fmt: skip
    errors += [f"{user.name}: {len(user.turns)} turns" for user in everybody if len(user.turns) != turns]
    told = [user for user in everybody if user.turns]
    errors += [f"{user.name}: {distance:.1e} from its replay" for user, distance in zip(told, far)
               if not distance <= CLOSE]  # fmt: skip
    errors += [f"exit status {status}"] * bool(status)
    row = counted(
        f"kills/{server}",
        {"users": users, "turns": turns, "kills": story.kills},
        turns=sum(len(user.turns) for user in everybody),
        repeated=story.repeated,
        unacknowledged=story.unacknowledged,
        distance=max(far, default=0.0),
    )
    if errors:
        row.status, row.note = "refused", "; ".join(errors[:5])
    return [row]


class _Story:
    """Users have their turns in threads of their own; the server is killed and started again meanwhile.

    Attributes:
        process: the server that runs.
        kills: how often it was killed.
        repeated: turns that a kill cut off, and that were had again.
        unacknowledged: turns that were kept though their answer never came.
    """

    def __init__(self, arguments: list[str], users: list[User], turns: int, answer: int, kills: int):
        self._arguments, self._users, self._turns, self._answer, self._kills = arguments, users, turns, answer, kills
        self._lock = threading.Lock()
        self.process = ServerProcess(arguments)
        self.kills = self.repeated = self.unacknowledged = 0

    def tell(self) -> None:
        """Have all turns."""
        threads = [threading.Thread(target=self._talk, args=(user,)) for user in self._users]
        for thread in threads:
            thread.start()
        total = len(self._users) * self._turns
        for kill in range(1, self._kills + 1):
            while sum(len(user.turns) for user in self._users) < total * kill // (self._kills + 1):
                if not any(thread.is_alive() for thread in threads):
                    return  # all have met an error
                time.sleep(0.002)
            self.process.kill()
            self.kills += 1
            self.process = ServerProcess(self._arguments)
        for thread in threads:
            thread.join()

    def _talk(self, user: User) -> None:
        try:
            self._have_turns(user)
        except Exception as error:
            user.errors.append(f"{type(error).__name__}: {error}")

    def _have_turns(self, user: User) -> None:
        for text in sayings(user.name, self._turns):
            while True:
                process = self.process
                try:
                    with Server(process.address, "model") as server:
                        if server.say(user, text, self._answer) is None:
                            return
                        break
                except ConnectionRefusedError:  # it is down: nothing was asked
                    time.sleep(0.02)
                except (OSError, http.client.HTTPException):
                    if self._was_kept(user, text):
                        break

    def _was_kept(self, user: User, text: str) -> bool:
        """After a cut connection: whether the memory has moved on, so that the turn is not had twice."""
        while True:
            time.sleep(0.05)
            try:
                with Server(self.process.address, "model") as server:
                    version = server.version(user.name)
                break
            except (OSError, http.client.HTTPException):
                continue
        with self._lock:
            if version == user.version:
                self.repeated += 1
                return False
            self.unacknowledged += 1
        if version < user.version:
            raise ValueError(f"the memory is at {version}, and was acknowledged at {user.version}")
        earlier = [message for turn in user.turns[-1:] if turn.reply for message in (turn.messages[-1], turn.reply)]
        messages = [*earlier, {"role": "user", "content": text}]
        user.turns.append(Turn(messages, None, user.version, version))
        return True
