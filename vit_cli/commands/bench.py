"""`vit bench`: images per second, how many the device could do, and where the time goes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_cli import models
from vit_cli.options import (
    Options,
    Parser,
    Reading,
    add_model,
    add_pixel_limit,
    add_precision,
    add_reading,
    positive,
    precision_of,
)
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.messages import counted, say
from vit_common.errors import MissingFileError
from vit_common.images.find import find_images

if TYPE_CHECKING:
    from vit_flax.inference import ImageClassifier
    from vit_flax.inference.engine import Engine

_PHOTOS = 32  # made where none are given
_PHOTO_SIZE = (640, 480)


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def add_options(parser: Parser) -> None:
    parser.usage = "vit bench [options] [IMAGE|DIR ...]"
    parser.description = (
        "Measure images per second: of the network alone, beside the matrix products it is made "
        "of, and of a stream of image files, with where its time goes. Without images, photos of "
        "noise are made."
    )
    parser.add_names(
        "IMAGE|DIR", "image files for the stream, or folders", least=0, most=None, wanted=""
    )
    add_model(parser)
    add_precision(parser)
    parser.add_argument(
        "--batch-sizes",
        metavar="N,...",
        type=_sizes,
        help="images per batch, rounded up to what the devices can share; the stream takes the "
        "last (default: 1,8,32 on a CPU, 1,64,512 elsewhere)",
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=positive,
        default=5,
        help="repetitions of each measurement (default: 5)",
    )
    parser.add_argument("--workers", metavar="N", type=positive, help="threads that read images")
    parser.add_argument(
        "--normalize-on-device", action="store_true", help="send 8-bit pixels to the device"
    )
    parser.add_argument(
        "--fast-decode", action="store_true", help="decode large JPEGs at a fraction of their size"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_pixel_limit(parser)
    add_reading(parser)


def run(options: Options) -> int:
    """Measure, and print a table.

    Raises:
        MissingFileError: the names hold no image.
        ViTError: the model cannot be loaded.
    """
    names, dtype, batch_sizes = options.names, options.dtype, options.batch_sizes
    files = list(find_images(names, lambda text: say("error", text), say))
    if names and not files:
        raise MissingFileError(f"{', '.join(names)}: no images to measure with.")
    say("loading the model")
    classify = models.load_for_inference(
        "ImageClassifier",
        options.model,
        dtype,
        workers=options.workers,
        fast_decode=options.fast_decode,
        normalize_on_device=options.normalize_on_device,
        **precision_of(options),
        **Reading.of(options).keywords,
    )
    if batch_sizes is None:
        batch_sizes = (1, 8, 32) if classify.engine.platform == "cpu" else (1, 64, 512)
    batch_sizes = _divisible(batch_sizes, classify.engine)
    result = {**describe(classify, dtype), **precision_of(options)}
    if not options.json:
        _print_head(result)
    rates = []
    for batch_size in batch_sizes:
        say(f"compiling and measuring the network alone, {counted(batch_size)} at once")
        rates.append(_network(classify, batch_size, options.rounds))
        if not options.json:
            _print_rate(rates[-1], first=len(rates) == 1)
    say("measuring a stream of images, for some ten seconds")
    with tempfile.TemporaryDirectory() as folder:
        stream = _stream(classify, files or _photos(Path(folder)), batch_sizes[-1], rates[-1])
    if options.json:
        print(json.dumps({**result, "network": rates, "stream": stream}, indent=2))
    else:
        _print_stream(stream, made=not files)
    return DONE


def _divisible(batch_sizes: Sequence[int], engine: Engine) -> list[int]:
    """Sizes that can be split over the devices, or groups of them; says which were not."""
    sizes = [engine.divisible(size) for size in batch_sizes]
    if sizes != list(batch_sizes):
        given, taken = ", ".join(map(str, batch_sizes)), ", ".join(map(str, dict.fromkeys(sizes)))
        say(
            f"batches are split over {engine.parts_of_batch} devices: {given} images become {taken}"
        )
    return list(dict.fromkeys(sizes))


def describe(classify: ImageClassifier, dtype: str) -> dict[str, Any]:
    """What is measured, and on what."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "dtype": dtype,
        "image_size": list(classify.image_size),
        "gflop_per_image": classify.flops / 1e9,
        "workers": classify.workers,
        "jax": jax.__version__,
    }


def _network(classify: ImageClassifier, batch_size: int, rounds: int) -> dict[str, Any]:
    from vit_flax.inference.measure import network_rate

    rate = network_rate(classify, batch_size, rounds)
    return {
        "batch_size": batch_size,
        "images_per_second": rate.images_per_second,
        "range": [min(rate.samples), max(rate.samples)],
        "products_alone": sorted(rate.limit)[len(rate.limit) // 2],
        "share": rate.share,
    }


def _stream(
    classify: ImageClassifier, files: Sequence[Any], batch_size: int, rate: Mapping[str, Any]
) -> dict[str, Any]:
    from vit_flax.inference.measure import host_rate, stream_rate

    alone = rate["images_per_second"]
    one_thread = host_rate(classify, files)
    # Some ten seconds, and batches enough for the pipeline to fill.
    images = int(max(4 * batch_size, 10 * min(alone, one_thread * classify.workers)))
    timings = stream_rate(classify, files, batch_size, images)
    return {
        "images": images,
        "batch_size": batch_size,
        "images_per_second": images / timings.total,
        "of_network_alone": images / timings.total / alone,
        "reading_per_second_one_thread": one_thread,
        "seconds": timings.total,
        "waiting_for_device": timings.waiting_for_device,
        "waiting_for_images": timings.waiting_for_images,
        "reading_in_threads": timings.decoding,
    }


def _photos(folder: Path) -> list[Path]:
    """JPEGs that take as long to decode as photos do."""
    import numpy as np
    import PIL.Image

    rng = np.random.default_rng(0)
    width, height = _PHOTO_SIZE
    paths = []
    for i in range(_PHOTOS):
        rough = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = PIL.Image.fromarray(rough).resize(_PHOTO_SIZE, PIL.Image.Resampling.BICUBIC)
        paths.append(folder / f"{i}.jpg")
        image.save(paths[-1], quality=90)
    return paths


# -- text


def _print_head(result: Mapping[str, Any]) -> None:
    H, W = result["image_size"]
    several = f"{result['devices']} x " if result["devices"] > 1 else ""
    held = "".join(
        f", {name.replace('_', ' ')} {result[name]}"
        for name in ("param_dtype", "weights", "activations")
        if name in result
    )
    print(
        f"{several}{result['device']}, jax {result['jax']}, {result['dtype']}{held}, {H} x {W}, "
        f"{result['gflop_per_image']:.3g} GFLOP per image"
    )


def _print_rate(rate: Mapping[str, Any], *, first: bool) -> None:
    if first:
        print(f"batch  images/s   {'range':<23} products alone  share")
    low, high = rate["range"]
    spread = f"{low:.4g} to {high:.4g}"
    print(
        f"{rate['batch_size']:<6} {rate['images_per_second']:<10.4g} {spread:<23} "
        f"{rate['products_alone']:<15.4g} {rate['share']:.0%}",
        flush=True,
    )


def _print_stream(stream: Mapping[str, Any], *, made: bool) -> None:
    total = stream["seconds"]
    what = f"JPEGs of {_PHOTO_SIZE[0]} x {_PHOTO_SIZE[1]}" if made else "the files"
    print(
        f"stream of {what}, batch {stream['batch_size']}: "
        f"{stream['images_per_second']:.4g} images/s, {stream['of_network_alone']:.0%} of the "
        "network alone"
    )
    device, images = stream["waiting_for_device"], stream["waiting_for_images"]
    print(
        f"  {total:.1f} s: waiting for the device {device / total:.0%}, for images "
        f"{images / total:.0%}, the rest {max(0.0, 1 - (device + images) / total):.0%}; "
        f"one thread reads {stream['reading_per_second_one_thread']:.4g} images/s"
    )
