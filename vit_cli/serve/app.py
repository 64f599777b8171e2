"""The ASGI application: routes, answers, and the errors in them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from importlib import resources
from typing import Any

import numpy as np

from vit_cli.serve import metrics as prometheus
from vit_cli.serve.bodies import Body, parse_body, read_body
from vit_cli.serve.limits import Deadline, Refusal
from vit_cli.serve.openapi import description
from vit_cli.serve.service import PREDICT, Service
from vit_common.errors import InputError
from vit_common.log import logger
from vit_common.versions import package_version
from vit_flax.inference.maps import patch_map, rollout

NEEDED = ("starlette", "uvicorn", "multipart")
_DIGITS = 5  # of attention, which is drawn
_PAGE_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def check_installed() -> None:
    """See that the libraries of the server are there.

    Raises:
        InputError: they are not.
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise InputError(
            "a server needs starlette, uvicorn and python-multipart; run: pip install starlette "
            "uvicorn python-multipart (the extra `serve`)"
        )


def make_app(service: Service, *, hosts: Iterable[str] | None = None) -> Any:
    """The application of a service, for any ASGI server.

    Args:
        service: the network; it is closed when the server ends.
        hosts: names in the Host header that are answered; None is any. A page of the Web could
            otherwise reach a server on this machine under a name of its own.

    Raises:
        InputError: starlette is not installed.

    Example:
        >>> service = Service(ImageClassifier.from_pretrained("google/vit-base-patch16-224"))
        >>> service.warm()
        >>> uvicorn.run(make_app(service), port=8000)
    """
    check_installed()
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    known = None if hosts is None else {*hosts}
    page = resources.files("vit_cli.serve").joinpath("page.html").read_bytes()
    limits = service.limits

    def refused(refusal: Refusal) -> Response:
        return JSONResponse({"error": refusal.text}, refusal.status, headers=refusal.headers)

    def endpoint(answer: Callable[[Any], Awaitable[Response]]) -> Any:
        """With the errors as answers, and counted."""

        async def answered(request: Any) -> Response:
            start = time.perf_counter()
            path = request.url.path
            try:
                host = request.headers.get("host", "").rpartition("]")
                name = host[0] + host[1] if host[1] else host[2].partition(":")[0]
                if known is not None and name.lower() not in known:
                    raise Refusal(
                        421, "this server does not answer to that name; see --allow-host."
                    )
                response = await answer(request)
            except Refusal as refusal:
                response = refused(refusal)
            except ConnectionResetError:
                response = Response(status_code=499)  # nobody reads it
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("%s: %s", path, error)
                response = refused(Refusal(500, "something went wrong here; it is in the log."))
            label = "/picture" if path.startswith("/picture/") else path
            service.metrics.request(label, response.status_code, time.perf_counter() - start)
            return response

        return answered

    async def body_of(request: Any, *options: str) -> tuple[Body, Deadline]:
        deadline = Deadline(limits.seconds)
        service.admit(1, 0)
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            service.admit(0, size)
            service.held += size
            held += size

        try:
            data = await read_body(request, limits, deadline, hold)
            body = await parse_body(request, data, limits)
            _check_options(request, body, options)
            return body, deadline
        finally:
            service.held -= held

    def left(request: Any) -> Callable[[], Coroutine[Any, Any, None]]:
        async def wait() -> None:
            """Until the client has gone away."""
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return wait

    def results(body: Body, values: list[Any], make: Callable[[Any], dict[str, Any]]) -> Response:
        """One object per image; the status is an error's only if all of them failed."""
        rows: list[dict[str, Any]] = []
        failed: list[Refusal] = []
        for name, value in zip(body.names, values, strict=True):
            row: dict[str, Any] = {} if name is None else {"name": name}
            if isinstance(value, Refusal):
                failed.append(value)
                rows.append({**row, "error": value.text})
            else:
                rows.append({**row, **make(value)})
        if len(failed) < len(rows):
            return JSONResponse({"model": service.name, "results": rows})
        if len(rows) == 1:
            return refused(failed[0])
        status = failed[0].status if len({each.status for each in failed}) == 1 else 422
        text = "none of the images could be taken."
        return JSONResponse({"error": text, "results": rows}, status)

    async def predict(request: Any) -> Response:
        if not service.classifies:
            raise Refusal(404, "this model has no classes; it has /features and /attention.")
        body, deadline = await body_of(request, "top_k")
        top_k = _number("top_k", request, body, 5)
        rows = await service.answer(PREDICT, body.images, deadline, left(request))
        return results(
            body,
            rows,
            lambda row: {
                "predictions": [
                    {"label": each.label, "index": each.index, "probability": each.probability}
                    for each in service.encoder.predictions(row[None], top_k)[0]
                ]
            },
        )

    async def features(request: Any) -> Response:
        body, deadline = await body_of(request)
        rows = await service.answer(service.features, body.images, deadline, left(request))
        return results(body, rows, lambda row: {"features": row.tolist()})

    async def attention(request: Any) -> Response:
        body, deadline = await body_of(request)
        if len(body.images) > 1:
            raise Refusal(422, f"attention is of one image; given {len(body.images)}.")
        (value,) = await service.answer(service.attention, body.images, deadline, left(request))
        if isinstance(value, Refusal):
            return refused(value)
        found = await service.aside(_attention, service, value, body.images[0])
        name = {} if body.names[0] is None else {"name": body.names[0]}
        return JSONResponse({"model": service.name, "results": [{**name, **found}]})

    async def neighbours(request: Any) -> Response:
        if service.index is None:
            raise Refusal(404, "this server was started without --index.")
        body, deadline = await body_of(request, "top")
        top = _number("top", request, body, 10)
        rows = await service.answer(service.near, body.images, deadline, left(request))
        good = [row for row in rows if not isinstance(row, Refusal)]
        found = iter(await service.search(np.stack(good), top) if good else [])
        values = [row if isinstance(row, Refusal) else next(found) for row in rows]
        return results(body, values, lambda near: {"neighbours": [each._asdict() for each in near]})

    async def picture(request: Any) -> Response:
        number = request.path_params["number"]
        data = await service.aside(service.picture, number)
        return Response(data, media_type="image/jpeg")

    async def health(request: Any) -> Response:
        if service.stopping:
            raise Refusal(503, "this server is being stopped.")
        return JSONResponse(
            {
                "status": "ok",
                "model": service.name,
                "version": package_version(),
                "classes": service.encoder.config.num_labels if service.classifies else None,
                "layers": service.encoder.config.num_hidden_layers,
                "heads": service.encoder.config.num_attention_heads,
                "index": None if service.index is None else len(service.index),
                "batch_size": service.batch_size,
                "waiting": service.waiting,
            }
        )

    async def measured(request: Any) -> Response:
        gauges = {
            "vit_waiting_images": ("Images waiting or being worked on.", service.waiting),
            "vit_held_bytes": ("Bytes of requests held.", service.held),
            "vit_compilations": ("Programs compiled.", service.encoder.compilations),
        }
        text = service.metrics.text(service.batches, gauges)
        return Response(text, headers={"content-type": prometheus.TYPE})

    async def schema(request: Any) -> Response:
        return JSONResponse(description(service))

    async def start_page(request: Any) -> Response:
        headers = {"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"}
        return Response(page, media_type="text/html", headers=headers)

    async def nothing(request: Any, error: Exception) -> Response:
        """What Starlette refuses by itself: a path or a method that is not there."""
        status = getattr(error, "status_code", 404)
        text = "there is nothing here; see /openapi.json."
        if status == 405:
            text = f"{request.method} is not for this path; see /openapi.json."
        service.metrics.request("other", status, 0.0)
        headers = getattr(error, "headers", None)  # of 405: the methods that are allowed
        return JSONResponse({"error": text}, status, headers=headers)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        service.stopping = True
        await asyncio.to_thread(service.close)

    posts = [
        ("/predict", predict),
        ("/features", features),
        ("/attention", attention),
        ("/neighbours", neighbours),
    ]
    gets = [
        ("/", start_page),
        ("/health", health),
        ("/metrics", measured),
        ("/openapi.json", schema),
        ("/picture/{number:int}", picture),
    ]
    return Starlette(
        routes=[
            *(Route(path, endpoint(answer), methods=["POST"]) for path, answer in posts),
            *(Route(path, endpoint(answer), methods=["GET"]) for path, answer in gets),
        ],
        exception_handlers={404: nothing, 405: nothing},
        lifespan=lifespan,
    )


def _check_options(request: Any, body: Body, known: Collection[str]) -> None:
    """Refuse options that there are not; a misspelt one would be ignored in silence.

    Raises:
        Refusal: one was given, in the query or beside the images.
    """
    odd = [name for name in {**request.query_params, **body.options} if name not in known]
    if odd:
        wanted = " or ".join(known) or "none"
        raise Refusal(422, f"unknown option {odd[0][:40]!r}; wanted {wanted}.")


def _number(name: str, request: Any, body: Body, default: int) -> int:
    """A positive integer of the query, or of the fields beside the images.

    Raises:
        Refusal: it is none.
    """
    given = request.query_params.get(name, body.options.get(name, default))
    text = str(given)
    if isinstance(given, bool) or not text.isdecimal() or not 0 < len(text) < 10 or int(text) < 1:
        raise Refusal(422, f"{name} must be a positive integer; given {text[:20]!r}.")
    return int(text)


def _attention(service: Service, value: np.ndarray, data: bytes) -> dict[str, Any]:
    """Where the network looks: for each block and head, over the patches."""
    config = service.encoder.config
    P, (height, width) = config.patch_height_width, service.encoder.image_size
    grid, prefix = (height // P[0], width // P[1]), config.num_prefix_tokens
    every = value.reshape(config.num_hidden_layers, config.num_attention_heads, *value.shape[-2:])
    maps = patch_map(every, grid, prefix)  # (L, A, h, w)
    whole = patch_map(rollout([layer[None] for layer in every])[0], grid, prefix)  # (h, w)
    picture = base64.b64encode(service.seen(data)).decode()
    return {
        "grid": list(grid),
        "attention": np.round(maps.astype(np.float64), _DIGITS).tolist(),
        "rollout": np.round(whole, _DIGITS).tolist(),
        "image": f"data:image/png;base64,{picture}",
    }
