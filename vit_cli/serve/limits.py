"""What a server takes, and what it says where it does not."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        body: bytes of one request.
        pixels: of one image; a larger one is refused before it is decoded.
        images: of one request.
        queue: images that are waiting or being worked on; more are refused.
        memory: bytes of requests that are held at once; more are refused.
        seconds: from the beginning of a request to its answer.
    """

    body: int = 20 << 20
    pixels: int = 1 << 26
    images: int = 64
    queue: int = 256
    memory: int = 256 << 20
    seconds: float = 30.0


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        text: what was wanted, what was given, what to do.
        retry: seconds after which to try again.
        close: whether the connection cannot be used on.
    """

    def __init__(
        self, status: int, text: str, *, retry: int | None = None, close: bool = False
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.retry, self.close = status, text, retry, close

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry is None else {"retry-after": str(self.retry)}
        return {**found, "connection": "close"} if self.close else found


class Deadline:
    """A moment that a request must be answered by."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, 0 afterwards."""
        return max(0.0, self._end - time.monotonic())
