"""The routes: chat completions, and the memories of users."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import ArgumentError, ConflictError, DeltaMemError, FileFormatError, StateError
from ..memory.bank import BankConflict, BankEntry, MemoryBank
from ..storage.bank_ids import check_id
from .contract import ChatRequest, ForgetRequest, Reply, error_body, in_words, memory_of, usage_of
from .failures import log_failure
from .fair_queue import QueueFullError
from .guard import Guard
from .jobs import Answered, ChatJob, Limits, TooLongError, unknown
from .metrics import Metrics


class Engine(Protocol):
    """What answers.

    Attributes:
        name: of the model, as requests call it.
        waiting: requests that wait.
        sound: requests are answered.
    """

    name: str
    bank: MemoryBank
    limits: Limits
    metrics: Metrics
    waiting: int
    sound: bool

    def chat(self, request: ChatRequest, say: Callable[[str, bool], None], peer: str, gone: threading.Event) -> ChatJob:
        """Let a request wait for its turn; see ``engine.Engine``."""

    def call(self, call: Callable[[], Any], memory_id: str) -> Future[Any]:
        """Run something while no turn of a memory is under way."""

    def forget(self, memory_id: str, text: str, strength: float | None) -> tuple[int, int]:
        """Erase from a memory what a text has written: (tokens of the text, the memory's version)."""

    def refuse(self) -> None:
        """Take nothing more, and say so to those that wait; what is under way goes on."""


_MOST_LISTED = 1000
_MEDIA = "application/octet-stream"


def make_app(engine: Engine, key: str | None = None) -> Guard:
    """The ASGI application around an engine.

    Args:
        key: the bearer token that requests need; None: none.
    """
    # No page of the routes: the library's fetches scripts from elsewhere, which could then ask this server.
    app = FastAPI(title="deltamem-fast", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_service(app, engine)
    _add_chat(app, engine)
    _add_memories(app, engine)
    return Guard(app, key, engine.limits.body, engine.metrics)


# --- errors


def status_of(error: BaseException) -> int:
    """The HTTP status that an error is told with."""
    if not isinstance(error, DeltaMemError) or isinstance(error, FileFormatError):  # that of the bank's file
        return 500
    if isinstance(error, QueueFullError):
        return 429
    if isinstance(error, TooLongError):
        return 413
    if isinstance(error, ConflictError | FileExistsError):
        return 409
    if isinstance(error, KeyError):
        return 404
    if isinstance(error, TimeoutError):
        return 503
    if isinstance(error, StateError):  # a ValueError, too
        return 503
    if isinstance(error, NotImplementedError):
        return 501
    return 400 if isinstance(error, ValueError | TypeError) else 500


def _told(error: BaseException) -> JSONResponse:
    status = status_of(error)
    if status == 500:
        log_failure("a request has failed", error)
        # What an error that nobody has foreseen says may be anything, of anybody's request.
        return JSONResponse(error_body(500, f"server: {type(error).__name__}; its log says more"), 500)
    return JSONResponse(error_body(status, str(error)), status, {"Retry-After": "1"} if status in (429, 503) else None)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        return JSONResponse(error_body(400, f"{field}: {first['msg'].lower()}"), 400)

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return _told(error)

    app.add_exception_handler(DeltaMemError, ours)
    app.add_exception_handler(Exception, ours)


async def _read(request: Request, kind: type[BaseModel]) -> Any:
    """The body of a request.

    Raises:
        HTTPException: 400, naming the field; 413.
    """
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise HTTPException(400, in_words(error)) from error


# --- the service itself


def _add_service(app: FastAPI, engine: Engine) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        found = {"status": "ok" if engine.sound else "broken", "model": engine.name, "waiting": engine.waiting}
        return JSONResponse(found, 200 if engine.sound else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "owned_by": "deltamem-fast"}]}


# --- chat completions


def _add_chat(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        asked: ChatRequest = await _read(request, ChatRequest)
        if asked.model != engine.name:
            raise HTTPException(404, f"model: got {asked.model!r:.80}, allowed {engine.name!r}")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def hand_over(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody waits
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        peer = request.client.host if request.client else ""
        gone = threading.Event()
        try:
            job = await run_in_threadpool(engine.chat, asked, lambda *piece: hand_over(piece), peer, gone)
        except BaseException:  # cancelled, the request may wait in the queue all the same
            gone.set()
            raise
        job.done.add_done_callback(lambda done: hand_over(None))
        reply = Reply(engine.name)
        if asked.stream:
            events = _stream(engine, asked, job, pieces, reply)
            return _Stream(events, gone)
        # A client that hangs up does not keep its row going, nor what it wrote.
        watch = asyncio.create_task(_gone(request))
        try:
            while True:
                item = asyncio.create_task(pieces.get())
                await asyncio.wait((item, watch), return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    return Response(status_code=499)
                if item.result() is None:
                    break
        finally:
            watch.cancel()
            gone.set()
        try:
            found: Answered = job.done.result()
        except Exception as error:
            return _told(error)
        memory = memory_of(asked, found.loaded, found.version)
        usage = usage_of(found.prompt, found.tokens)
        return JSONResponse(reply.whole(found.message, found.finish, usage, memory))


async def _gone(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    engine: Engine, asked: ChatRequest, job: Any, pieces: asyncio.Queue, reply: Reply
) -> AsyncIterator[bytes]:  # fmt: skip
    """The events of a stream."""
    began, first = asyncio.get_running_loop().time(), True
    yield _event(reply.chunk({"role": "assistant", "content": ""}))
    while (item := await pieces.get()) is not None:
        if first:
            engine.metrics.first.observe(asyncio.get_running_loop().time() - began)
            first = False
        piece, thinking = item
        yield _event(reply.chunk({"reasoning_content" if thinking else "content": piece}))
    try:
        found: Answered = job.done.result()
    except Exception as error:
        yield b"data: " + bytes(_told(error).body) + b"\n\n"
        return
    # Not before the memory is committed: who has read this knows that it is kept.
    memory = memory_of(asked, found.loaded, found.version)
    yield _event(reply.chunk({}, found.finish, memory=memory))
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield _event(reply.usage(usage_of(found.prompt, found.tokens)))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


# --- memories


def _add_memories(app: FastAPI, engine: Engine) -> None:
    bank = engine.bank

    @app.get("/v1/memories")
    async def listed(
        prefix: str = "", limit: int = Query(100, ge=1, le=_MOST_LISTED), offset: int = Query(0, ge=0)
    ) -> dict[str, Any]:
        entries = await run_in_threadpool(lambda: bank.list(prefix=prefix, limit=limit, offset=offset))
        return {
            "object": "list",
            "data": [_entry(entry) for entry in entries],
            "total": await run_in_threadpool(bank.__len__),
        }

    @app.get("/v1/memories/{memory_id:path}", response_model=None)
    async def export(memory_id: str) -> Response:
        return Response(await run_in_threadpool(_exported, engine, memory_id), media_type=_MEDIA)

    @app.put("/v1/memories/{memory_id:path}")
    async def import_(request: Request, memory_id: str, overwrite: bool = False) -> dict[str, Any]:
        data = await request.body()
        return await _settled(engine, lambda: _imported(engine, memory_id, data, overwrite), memory_id)

    @app.delete("/v1/memories/{memory_id:path}")
    async def delete(memory_id: str) -> dict[str, Any]:
        # At once, not in its turn: a turn that is under way finds it gone, and keeps nothing.
        if not await run_in_threadpool(lambda: bank.delete([check_id(memory_id, "memory_id")])):
            raise unknown(memory_id)
        return {"id": memory_id, "deleted": True}

    @app.post("/v1/forget")
    async def forget(request: Request) -> dict[str, Any]:
        asked: ForgetRequest = await _read(request, ForgetRequest)
        call = lambda: engine.forget(asked.memory_id, asked.text, asked.strength)  # noqa: E731
        tokens, version = await _settled(engine, call, asked.memory_id)
        return {"id": asked.memory_id, "tokens": tokens, "version": version}


class _Stream(StreamingResponse):
    """A stream of events. When it ends, however it ends, nobody waits any more."""

    def __init__(self, events: AsyncIterator[bytes], gone: threading.Event):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._gone = gone

    async def __call__(self, scope, receive, send) -> None:
        # Not in the iterator, which is not even begun for a client that has hung up already.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._gone.set()


async def _settled(engine: Engine, call: Callable[[], Any], memory_id: str) -> Any:
    """What ``call`` returns, run in the memory's turn."""
    future = await run_in_threadpool(engine.call, call, memory_id)
    return await asyncio.wrap_future(future)


def _entry(entry: BankEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "version": entry.version,
        "bytes": entry.bytes,
        "created": entry.created.isoformat(),
        "updated": entry.updated.isoformat(),
    }


def _exported(engine: Engine, memory_id: str) -> bytes:
    """A memory as a file, as ``MemoryState.save`` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        try:
            engine.bank.export(check_id(memory_id, "memory_id"), path)
        except KeyError as error:
            raise unknown(memory_id) from error
        return path.read_bytes()


def _imported(engine: Engine, memory_id: str, data: bytes, overwrite: bool) -> dict[str, Any]:
    """Store a memory that was exported."""
    check_id(memory_id, "memory_id")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        path.write_bytes(data)
        try:
            engine.bank.import_(memory_id, path, overwrite=overwrite)
        except BankConflict:
            raise
        except ValueError as error:
            # Without the name of a file that the client does not know.
            raise ArgumentError(str(error).replace(f"path: {path}", "body").replace(str(path), "body")) from error
    entry = next((entry for entry in engine.bank.list(prefix=memory_id, limit=1) if entry.id == memory_id), None)
    if entry is None:  # deleted in between
        raise unknown(memory_id)
    return _entry(entry)
