"""Asks an ASGI application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    app: Any,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    kind: str | None = "image/png",
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    stated: bool = True,
    ends: bool = True,
    leaves: asyncio.Event | None = None,
) -> Answer:
    """One request.

    Args:
        app: the application.
        path: with its query.
        body: all of it, or its parts.
        kind: its Content-Type.
        method: of HTTP.
        headers: more of them.
        stated: whether Content-Length says how long it is.
        ends: whether the last part comes.
        leaves: set when the client goes away.
    """
    parts = [body] if isinstance(body, bytes) else list(body)
    path, _, query = path.partition("?")
    sent = {"host": "127.0.0.1:8000", **(headers or {})}
    if kind is not None:
        sent["content-type"] = kind
    if stated and "content-length" not in sent:
        sent["content-length"] = str(sum(map(len, parts)))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("x", 80),
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
    }
    waiting = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts) or not ends}
        for i, part in enumerate(parts)
    ]
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await app(scope, receive, send)
    start, *bodies = messages
    return Answer(
        start["status"],
        {name.decode().lower(): value.decode() for name, value in start["headers"]},
        b"".join(each.get("body", b"") for each in bodies),
    )
