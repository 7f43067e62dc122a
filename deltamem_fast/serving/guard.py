"""In front of every route: who may ask, and how much may be sent.

A page in a browser can send requests to a server on loopback, too. Without a token only those are answered that a page
of another site cannot send unasked: with this machine's name in ``Host``, JSON as JSON, and not what a browser says to
come from elsewhere (``Sec-Fetch-Site``): a page cannot read what such a request is answered, but how long it took.
"""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..arguments import MOST_64
from .contract import error_body
from .failures import log_failure
from .hosts import is_loopback, without_port
from .metrics import Metrics

_OPEN = ("/health",)


class Guard:
    """ASGI middleware: a bearer token, the size of a body, and a count of what was answered.

    Args:
        app: what is guarded.
        key: the token that requests must have; None: none is needed.
        body: bytes of a request at most.
    """

    def __init__(self, app: Any, key: str | None, body: int, metrics: Metrics):
        self.app, self._key, self._body, self._metrics = app, key, body, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, started = time.monotonic(), 500, False

        async def telling(message: dict[str, Any]) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            await self._checked(scope, receive, telling)
        except Exception as error:
            # Starlette raises again what it has told the client as a 500, and uvicorn would log it as it reads.
            if status != 500 or not started:
                log_failure("an answer was cut off", error)
                raise RuntimeError(f"{type(error).__name__}, see above") from None
        finally:
            # By the route's pattern: a path has a user's id in it. What no route has matched is one name for all.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - began)

    async def _checked(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in _OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key.encode()):
                told = error_body(401, "authorization: allowed the bearer token that the server was started with")
                await JSONResponse(told, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        host = headers.get(b"host", b"").decode("latin-1")
        if self._key is None and not is_loopback(without_port(host)):
            told = f"host: got {host!r:.80}, allowed localhost or an address of loopback: the server has no token"
            await JSONResponse(error_body(403, told), 403)(scope, receive, send)
            return
        site = headers.get(b"sec-fetch-site", b"none").decode("latin-1")
        if self._key is None and site not in ("none", "same-origin"):
            told = f"sec-fetch-site: got {site!r:.80}, allowed same-origin, none: the server has no token"
            await JSONResponse(error_body(403, told), 403)(scope, receive, send)
            return
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if scope["method"] == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
            told = error_body(415, f"content-type: got {kind!r:.80}, allowed application/json")
            await JSONResponse(told, 415)(scope, receive, send)
            return
        said = headers.get(b"content-length", b"0")
        size = (
            min(int(said[:20]), MOST_64) if said.isdigit() else 0
        )  # of more digits than these, it is too large as well
        if size > self._body:
            await JSONResponse(error_body(413, self._too_large(size)), 413)(scope, receive, send)
            return
        found = 0

        async def counting() -> dict[str, Any]:
            nonlocal found
            message = await receive()
            found += len(message.get("body", b""))
            if found > self._body:
                raise HTTPException(413, self._too_large(found))
            return message

        await self.app(scope, counting, send)

    def _too_large(self, found: int) -> str:
        return f"body: got {found:,} bytes and maybe more, allowed {self._body:,}"
