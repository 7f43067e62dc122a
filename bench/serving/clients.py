"""Clients of a server: each user has a memory, says one thing after another, and keeps what was answered."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gwen", "Hugo")
PLACES = ("Lisbon", "Oslo", "Paris", "Rome", "Kyoto", "Quito", "Cairo", "Perth")
SAYINGS = (
    "My name is {name}.",
    "I moved to {place} in May, and keep bees there.",
    "My sister {name} lives in {place}.",
    "The code of the door is {number}.",
    "Where do I live?",
    "What is my name?",
    "On Monday {name} took the train to {place}; she came home late.",
    "What is the code of the door?",
)


def sayings(user: str, count: int) -> list[str]:
    """What a user says, one thing after another; always the same for a name."""
    draw = random.Random(user)
    return [
        draw.choice(SAYINGS).format(name=draw.choice(NAMES), place=draw.choice(PLACES), number=draw.randrange(10, 99))
        for _ in range(count)
    ]


@dataclass
class Turn:
    """One turn, as a client knows it.

    Attributes:
        messages: the request's.
        reply: the answer's message; None: it never came, and the memory has it all the same.
        loaded, version: of the memory, before it and after it.
        seconds: from the request to the whole answer.
    """

    messages: list[dict[str, Any]]
    reply: dict[str, Any] | None
    loaded: int
    version: int
    seconds: float = 0.0


@dataclass
class User:
    """A user, and the turns that were had.

    Attributes:
        errors: what a server said when it should have answered, and what it told that cannot be.
    """

    name: str
    turns: list[Turn] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def version(self) -> int:
        """Of the memory after the last turn; 0: there is none yet."""
        return self.turns[-1].version if self.turns else 0


class Server:
    """A server's address, as one client asks it; keeps its connection."""

    def __init__(self, address: str, model: str, key: str | None = None, timeout: float = 120.0):
        parts = urllib.parse.urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self.model = model

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self._connection.close()

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of an answer.

        Raises:
            OSError, http.client.HTTPException: there is no server, or it ended meanwhile.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, path, data, self._headers)
            response = self._connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self._connection.close()
            raise

    def version(self, memory_id: str) -> int:
        """The version of a memory, or 0."""
        status, body = self.request("GET", f"/v1/memories?limit=1&prefix={urllib.parse.quote(memory_id)}")
        if status != 200:
            raise OSError(f"{status}: {body[:200]!r}")
        found = [entry for entry in json.loads(body)["data"] if entry["id"] == memory_id]
        return found[0]["version"] if found else 0

    def exported(self, memory_id: str) -> bytes:
        """A memory as a file."""
        status, body = self.request("GET", f"/v1/memories/{urllib.parse.quote(memory_id, safe='')}")
        if status != 200:
            raise OSError(f"{status}: {body[:200]!r}")
        return body

    def say(self, user: User, text: str, answer: int, history: int = 1, **more: Any) -> Turn | None:
        """Have a turn; None, and an error of the user's, if it was refused.

        Args:
            answer: tokens of the answer at most.
            history: turns before it that are sent along.
            more: other fields of the request.
        """
        messages = []
        for turn in user.turns[max(0, len(user.turns) - history) :] if history else ():
            if turn.reply is not None:
                messages += [turn.messages[-1], turn.reply]
        messages.append({"role": "user", "content": text})
        body = {"model": self.model, "memory_id": user.name, "messages": messages, "max_tokens": answer} | more
        began = time.perf_counter()
        status, data = self.request("POST", "/v1/chat/completions", body)
        seconds = time.perf_counter() - began
        if status != 200:
            user.errors.append(f"{status}: {data[:200].decode(errors='replace')}")
            return None
        found = json.loads(data)
        memory = found["memory"]
        if memory["id"] != user.name or memory["loaded"] != user.version:
            user.errors.append(f"memory {memory}, wanted that of {user.name} at {user.version}")
        turn = Turn(messages, found["choices"][0]["message"], memory["loaded"], memory["version"], seconds)
        user.turns.append(turn)
        return turn


def refused(users: Sequence[User]) -> list[str]:
    """The first errors of users, and how many there were."""
    every = [f"{user.name}: {error}" for user in users for error in user.errors]
    return every[:5] + ([f"and {len(every) - 5} more"] if len(every) > 5 else [])
