"""What the server lets through: the page itself and its events, and nothing that could name a file of the machine.

Gradio serves uploads, files, proxied addresses and an API besides. The page needs none of them: pictures travel inside
events, both ways. So they are closed here, before Gradio sees the request, whatever a later release adds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 20_000_000  # of a picture's file
MOST_BODY = MOST_BYTES * 4 // 3 + 100_000  # the same in base64, with what is around it

_READ = {"/", "/config", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt"}
_READ |= {f"/gradio_api/{name}" for name in ("queue/data", "startup-events")}
_READ_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
_WRITTEN = {f"/gradio_api/{name}" for name in ("queue/join", "cancel", "reset")}


class Guard:
    """ASGI middleware around Gradio's application.

    Answers 403 to every address but those above and to events that hold a file's path or address, and 413 to events
    larger than a picture of `MOST_BYTES`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path, method = scope["path"].rstrip("/") or "/", scope.get("method")
        reads = method in ("GET", "HEAD") and (path in _READ or path.startswith(_READ_BELOW))
        if scope["type"] == "http" and reads and ".." not in path:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and method == "POST" and path in _WRITTEN:
            await self._event(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("not a part of this page", 403)(scope, receive, send)

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BODY:
                await PlainTextResponse("more than a picture may have", 413)(scope, receive, send)
                return
        try:
            files = any(map(_is_file, _dictionaries(json.loads(body or b"null"))))
        except (ValueError, RecursionError):
            files = True
        if files:
            await PlainTextResponse("events of this page hold no files", 403)(scope, receive, send)
            return
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _dictionaries(item)


def _is_file(value: dict[str, Any]) -> bool:
    """Whether a dictionary is what Gradio takes for a file: it would look for the path, or fetch the address."""
    return "path" in value or "url" in value
