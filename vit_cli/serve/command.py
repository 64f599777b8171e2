"""`vit serve`: a network behind HTTP, and a page to try it on."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vit_cli.models import load_for_inference
from vit_cli.options import (
    DTYPES,
    Options,
    Parser,
    Reading,
    add_batches,
    add_precision,
    add_reading,
    positive,
    precision_of,
)
from vit_cli.serve.limits import Limits
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED
from vit_cli.terminal.messages import logged, say
from vit_common.errors import NoClassifierError

_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_USUAL = Limits()


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535; given {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds; given {text!r}")
    return number


def add_options(parser: Parser) -> None:
    parser.usage = "vit serve [options] [MODEL]"
    parser.description = (
        "Serve a model over HTTP: POST an image to /predict, /features or /attention; the page at "
        "/ takes photos. Requests are gathered into batches. /openapi.json describes all of it."
    )
    parser.add_names(
        "MODEL",
        "folder, weights file, or name on the Hub; without it, a small model of handwritten digits "
        "that comes with the package (with --index: the model that the index names)",
        least=0,
        most=1,
        wanted="one model",
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is every network of this machine, and there is no "
        "password (default: 127.0.0.1, this machine alone)",
    )
    parser.add_argument(
        "--port", metavar="N", type=_port, default=8000, help="0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer requests to this name too, such as that of a proxy; may be repeated",
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="features of `vit features`, to find the nearest pictures in",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="compute dtype (default: that of the index, or float32)",
    )
    add_precision(parser)
    add_batches(parser)
    group = parser.add_argument_group("limits")
    for name, what, usual in (
        ("queue", "images that wait or are worked on; more get 429", _USUAL.queue),
        ("max-images", "images per request", _USUAL.images),
        ("max-bytes", "bytes per request", _USUAL.body),
        ("max-pixels", "pixels per image", _USUAL.pixels),
    ):
        group.add_argument(
            f"--{name}",
            dest=f"most_{name.removeprefix('max-')}",
            metavar="N",
            type=positive,
            default=usual,
            help=f"{what} (default: {usual})",
        )
    group.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=_USUAL.seconds,
        help=f"seconds from a request to its answer (default: {_USUAL.seconds:g})",
    )
    add_reading(parser)


def limits_of(options: Options) -> Limits:
    """The limits that were given."""
    return dataclasses.replace(
        _USUAL,
        queue=options.most_queue,
        images=min(options.most_images, options.most_queue),
        body=options.most_bytes,
        pixels=options.most_pixels,
        memory=max(_USUAL.memory, 2 * options.most_bytes),
        seconds=options.timeout,
    )


def run(options: Options) -> int:
    """Serve until SIGINT or SIGTERM.

    Returns:
        The exit code: 130 if a second SIGINT came before all requests were answered.

    Raises:
        ViTError: the model or the index cannot be used, or the address not be listened on.
    """
    from vit_cli.serve.app import check_installed, make_app

    check_installed()
    from vit_cli.serve.server import listen, serve

    with ExitStack() as stack:
        listener = stack.enter_context(listen(options.host, options.port))
        host, port = listener.getsockname()[:2]
        service = make_service(options, stack)
        shown = f"[{host}]" if ":" in host else host
        import PIL.Image

        # Images are looked at before they are decoded; Pillow's own bound is for nobody to meet.
        stack.callback(setattr, PIL.Image, "MAX_IMAGE_PIXELS", PIL.Image.MAX_IMAGE_PIXELS)
        PIL.Image.MAX_IMAGE_PIXELS = None
        stack.enter_context(logged("uvicorn.error", least="ERROR"))
        say(f"serving {service.name} at http://{shown}:{port} (Ctrl-C ends it)")
        ended = serve(
            make_app(service, hosts=names_of(options, host)),
            listener,
            connections=4 * service.limits.queue,
            seconds=service.limits.seconds,
        )
        say(f"stopped after {sum(service.metrics.images.values())} images")
    return DONE if ended else INTERRUPTED


def names_of(options: Options, host: str) -> set[str] | None:
    """Names in the Host header that are answered; None is any.

    Args:
        options: of the command.
        host: the address that is listened on.
    """
    more = {name.lower() for name in options.allow_host}
    if ipaddress.ip_address(host).is_loopback:
        return {*_LOCAL, host, *more}
    return {options.host.lower(), *more} if more else None


def make_service(options: Options, stack: ExitStack) -> Any:
    """The model and the index, loaded and compiled.

    Raises:
        ViTError: one of them cannot be used.
    """
    from vit_cli.search.command import How
    from vit_cli.serve.service import Service
    from vit_flax.inference import ImageIndex

    name = options.names[0] if options.names else None
    index, near = None, ((-1,), "auto")
    how = None
    if options.index is not None:
        index = stack.enter_context(ImageIndex.open(options.index))
        options.layers = options.pool = None
        how = How(options, index, name)
        name, near = how.name, (how.layers, how.pool)

    def load(kind: str) -> Any:
        if how is not None:
            return how.load(kind, options.devices)
        return load_for_inference(
            kind,
            name,
            options.dtype or "float32",
            devices=options.devices,
            **precision_of(options),
            **Reading.of(options).keywords,
        )

    try:
        encoder = load("ImageClassifier")
    except NoClassifierError:
        encoder = load("ImageEncoder")
    if how is not None:
        how.check(encoder)
    service = Service(
        encoder,
        name=name or "digits",
        batch_size=options.batch_size,
        limits=limits_of(options),
        index=index,
        neighbours=near,
        beside=None if options.index is None else Path(options.index).parent,
    )
    service.warm(say)
    return service
