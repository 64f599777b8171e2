"""`vit features`: image files in, a file of embeddings out."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from vit_cli.models import load_for_stream
from vit_cli.options import Options, Parser, StreamOptions, add_ray, add_stream, layer_numbers


def add_options(parser: Parser) -> None:
    parser.usage = "vit features [options] IMAGE|DIR ... --output FILE"
    parser.description = (
        "Write image embeddings to one file: the backbone's output for each image. Any model will "
        "do, with a classifier or without. Images that cannot be read are named on standard error "
        "and in the file; the exit code is then 1."
    )
    parser.add_argument("--output", metavar="FILE", help=".npz, .parquet or .safetensors file")
    parser.add_argument(
        "--layers",
        metavar="L,...",
        type=layer_numbers,
        default=(-1,),
        help="blocks, the first is 0; -1 is the last, after the final norm (default: -1)",
    )
    parser.add_argument(
        "--pool",
        choices=("cls", "mean", "none"),
        help="the class token, the mean of the patches, or all tokens (default: cls, or mean for a "
        "network without a class token)",
    )
    parser.add_argument(
        "--store-dtype",
        choices=("float32", "float16"),
        default="float32",
        help="dtype of the numbers in the file (default: float32)",
    )
    add_stream(parser, same="--layers, --pool, --store-dtype")
    add_ray(parser)

    def check(options: Options) -> None:
        if options.output is None:
            parser.error("--output FILE is needed")

    parser.checks.insert(1, check)  # before what several hosts say of it


def _usual_pool(stream: StreamOptions) -> str:
    """The pooling of a model, as its configuration says; the file of a run names it."""
    from vit_common.config import is_timm
    from vit_common.errors import ViTError
    from vit_common.features import features_pool
    from vit_convert.source import config_from_dict, read_config_file

    if stream.model is not None:
        with suppress(ViTError):  # loading the model says what is wrong
            table = read_config_file(stream.model)
            if table is not None and not is_timm(table):
                return features_pool(config_from_dict(table))
    return "cls"


def run(options: Options) -> int:
    """Write the features of image files into one file.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded, or the file not be written.
        HostError: another process did not come, or stopped.
    """
    from vit_cli.runs.feature_file import FeatureFile
    from vit_cli.runs.job import Job, Work

    stream = StreamOptions.of(options)
    pool = options.pool or _usual_pool(stream)
    pool = None if pool == "none" else pool
    if options.on == "ray":
        from vit_cli.runs.ray_run import run_on_ray

        how = {"layers": options.layers, "pool": pool, "store_dtype": options.store_dtype}
        return run_on_ray(options, stream, "ImageFeatures", how)

    def begin(files: list[str]) -> Work:
        encoder = load_for_stream("ImageEncoder", stream, files)
        size = stream.batch_size or encoder.default_batch_size
        return Work(encoder.stream_features(files, options.layers, pool, size), size)

    settings = {"layers": list(options.layers), "pool": pool, "store_dtype": options.store_dtype}
    rows = partial(FeatureFile, dtype=options.store_dtype)
    return Job(stream, settings, begin, rows, what="features").run()
