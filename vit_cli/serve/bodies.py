"""From the body of a request to images: raw bytes, a form, or JSON with base64. All of it is
bounded before it is in memory."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

from vit_cli.serve.limits import Deadline, Limits, Refusal

_RAW = ("application/octet-stream", "binary/octet-stream")
_WANTED = "an image (Content-Type: image/...), a form (multipart/form-data) or JSON"
_DRAINED = 64 << 20  # bytes of a body that is refused, which are read and dropped
_DRAINING = 2.0  # seconds of that
_FIELDS = 8  # of a form, beside its files
_FIELD_BYTES = 1024


class Body(NamedTuple):
    """What a request holds.

    Attributes:
        images: contents of files.
        names: of them, where they were given.
        options: fields beside them, as texts or as JSON has them.
    """

    images: list[bytes]
    names: list[str | None]
    options: dict[str, Any]


async def read_body(
    request: Any, limits: Limits, deadline: Deadline, hold: Callable[[int], object]
) -> bytes:
    """The whole body.

    Args:
        request: of Starlette.
        limits: of the server.
        deadline: of the answer.
        hold: told the bytes of each part as it comes; may raise Refusal.

    Raises:
        Refusal: it is too large, comes too slowly, or states a length that is none.
        ConnectionResetError: the client went away.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "a body may not be compressed (Content-Encoding).")
    length = request.headers.get("content-length")
    if length is not None and (not length.isdecimal() or len(length) > 18):
        raise Refusal(400, "Content-Length must be a number.", close=True)
    if int(length or 0) > limits.body:
        if "expect" not in request.headers:
            await _drain(request)
        raise Refusal(
            413, f"a request may have at most {limits.body} bytes; given {length}.", close=True
        )
    parts: list[bytes] = []
    total = 0
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), deadline.left or 1e-3)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {limits.seconds:g} seconds.", close=True
            ) from None
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        part = message.get("body", b"")
        total += len(part)
        if total > limits.body:
            await _drain(request)
            raise Refusal(413, f"a request may have at most {limits.body} bytes.", close=True)
        hold(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _drain(request: Any) -> None:
    """Read on for a moment, so that a client that writes before it reads gets its answer."""
    total = 0

    async def read() -> None:
        nonlocal total
        while total < _DRAINED:
            message = await request.receive()
            total += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(read(), _DRAINING)


async def parse_body(request: Any, data: bytes, limits: Limits) -> Body:
    """The images in a body.

    Raises:
        Refusal: it is of no kind that is taken, is broken, or holds no image or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind in _RAW:
        if not data:
            raise Refusal(400, f"the body is empty; wanted {_WANTED}.")
        return Body([data], [None], {})
    if kind == "multipart/form-data":
        found = await _form(request, data, limits)
    elif kind == "application/json" or kind.endswith("+json"):
        found = await asyncio.to_thread(_json, data, limits)  # 0.1 s for 20 MB
    else:
        raise Refusal(415, f"wanted {_WANTED}; given {kind or 'no Content-Type'}.")
    if not found.images:
        raise Refusal(422, "there is no image in this request.")
    return found


async def _form(request: Any, data: bytes, limits: Limits) -> Body:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    parser = MultiPartParser(
        request.headers,
        stream(),
        max_files=limits.images,
        max_fields=_FIELDS,
        max_part_size=_FIELD_BYTES,
    )
    parser.spool_max_size = limits.body + 1  # it is in memory already; nothing goes to the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        many = "Too many files" in error.message
        text = f"at most {limits.images} images a request" if many else error.message.rstrip(".")
        raise Refusal(413 if many else 400, f"{text}.") from error
    except Exception as error:  # of python-multipart, for what is no form
        raise Refusal(400, "this is no valid multipart/form-data.") from error
    images: list[bytes] = []
    names: list[str | None] = []
    options: dict[str, Any] = {}
    for key, value in form.multi_items():
        if isinstance(value, UploadFile):
            images.append(await value.read())
            names.append(value.filename or None)
        else:
            options[key] = value
    await form.close()
    return Body(images, names, options)


def _json(data: bytes, limits: Limits) -> Body:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON.") from error
    if not isinstance(table, dict):
        raise Refusal(422, 'wanted a JSON object with "image" or "images".')
    given = table.pop("images", None)
    if given is None:
        given = [table.pop("image", None)]
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise Refusal(422, '"image" must be base64, and "images" a list of it.')
    if len(given) > limits.images:
        raise Refusal(413, f"at most {limits.images} images a request; given {len(given)}.")
    images = []
    for each in given:
        head, comma, text = each.partition(",")
        text = text if comma and head.startswith("data:") else each
        try:
            images.append(base64.b64decode("".join(text.split()), validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refusal(422, "an image is not valid base64.") from error
    return Body(images, [None] * len(images), table)
