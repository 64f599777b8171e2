"""uvicorn as it is run here: headers must come in time, and signals end it in good order."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

from vit_common.errors import InputError
from vit_common.files.texts import reason

_HEADER_SECONDS = 10.0
_KEEP_SECONDS = 15
_BACKLOG = 2048
_GRACE = 5.0  # seconds more than a request may take


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: the address is none, or taken, or may not be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        made = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        why = reason(error).partition(" (while attempting")[0]  # which names the address again
        raise InputError(
            f"cannot listen on {host}, port {port} ({why}); see --host and --port."
        ) from error
    return made


def serve(app: Any, listener: socket.socket, *, connections: int, seconds: float) -> bool:
    """Answer until SIGINT or SIGTERM; then finish what is being answered. A second SIGINT ends it
    at once.

    Args:
        app: the application.
        listener: where from.
        connections: at a time; further ones are refused with 503.
        seconds: that a request may take.

    Returns:
        Whether it ended in good order; False after a second SIGINT.
    """
    import asyncio

    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """A connection on which headers must come in time."""

        _timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """The clock runs while a request is expected that is not there yet."""
            if self.cycle is None or self.cycle.response_complete:
                if self._timer is None:
                    self._timer = self.loop.call_later(_HEADER_SECONDS, self._late)
            else:
                self._unwatch()

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:
                text = b'{"error":"the headers did not come in time."}'
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: "
                    b"application/json\r\ncontent-length: %d\r\n\r\n" % len(text) + text
                )
                self.transport.close()

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Without uvicorn's raising of the signals once more at the end."""
            kept = {}
            for number in (signal.SIGINT, signal.SIGTERM):
                kept[number] = signal.signal(number, self.handle_exit)
            try:
                yield
            finally:
                for number, handler in kept.items():
                    signal.signal(number, handler)

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_SECONDS,
        timeout_graceful_shutdown=int(seconds + _GRACE),
    )
    server = Server(config)

    def wanted(record: logging.LogRecord) -> bool:
        """Not the cancelled tasks of a server that was told to end at once."""
        return not server.force_exit

    log = logging.getLogger("uvicorn.error")
    log.addFilter(wanted)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        log.removeFilter(wanted)
    return not server.force_exit
