"""The options of every subcommand. `parse` gives the call to make; it makes none itself.

argparse rather than typer: `vit predict --help` takes 0.08 s of processor time with the one and
0.33 s with the other (typer 0.29, which loads pydantic for any subcommand; bare Python 0.02 s).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vit_common.errors import InputError

Command = Callable[[], int]
"""A subcommand with its options; returns the exit code."""

# As `vit_convert.formats` has them; repeated here so that `--help` need not load it.
_WRITTEN = ("hub", "flax", "flax-safetensors", "timm", "deit", "dino", "beit", "dinov2", "google")
_DTYPES = ("float32", "bfloat16", "float16")
# As `vit_flax.export.read` has them.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}; see `{self.prog} --help`.")

    def print_help(self, file: Any = None) -> None:
        # argparse's own keeps quiet about a pipe that is closed or a disk that is full.
        (file or sys.stdout).write(self.format_help())


def _parser(name: str, description: str, **options: Any) -> _Parser:
    return _Parser(prog=name, description=description, allow_abbrev=False, **options)


def _parse(
    parser: _Parser, arguments: Sequence[str], metavar: str, help: str
) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the names among and after them; all that follows `--` is names."""
    parser.add_argument("names", metavar=metavar, nargs="*", help=help)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_intermixed_args(arguments[:end])
    return options, [*options.names, *arguments[end + 1 :]]


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; given {text!r}")
    return number


def _shard(text: str) -> tuple[int, int]:
    """ "2/8" as (1, 8)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N; given {text!r}")
    return int(index) - 1, int(count)


def _add_pixel_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels",
        metavar="N",
        type=_positive,
        help="refuse images of more pixels, which might unpack to gigabytes (178956970)",
    )


def _limited(max_pixels: int | None, command: Command) -> Command:
    """The command, with Pillow's limit set for as long as it runs."""
    if max_pixels is None:
        return command

    def limited() -> int:
        import PIL.Image

        before = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # Pillow refuses beyond twice that
        try:
            return command()
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = before

    return limited


def _add_hub_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models on the Hugging Face Hub")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    group.add_argument("--subfolder", metavar="DIR", help="folder of the model in its repository")
    group.add_argument(
        "--local-files-only", action="store_true", help="use what was downloaded before; no network"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="folder, weights file, or name on the Hub such as google/vit-base-patch16-224; "
        "without it, a small model of handwritten digits that comes with the package",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="what the model computes in (float32)",
    )


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--devices", metavar="N", type=_positive, help="devices of this machine to use (all)"
    )
    group.add_argument(
        "--model-parallel",
        metavar="M",
        type=_positive,
        default=1,
        help="split the network, heads and MLP, over M devices, where one does not hold it (1)",
    )


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT; given {text!r}")
    return text


def _add_host_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several hosts",
        "Start the same command on each; images and output are on a file system they share.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        type=_address,
        help="address of the first process, with a free port, where the others meet it",
    )
    group.add_argument(
        "--process", metavar="I/N", type=_shard, help="this is the I-th of N processes, I from 1"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find both out, on TPU pods, under Slurm and under Open MPI",
    )
    group.add_argument(
        "--start-timeout",
        metavar="S",
        type=_positive,
        default=300,
        help="seconds to wait for the other processes (300)",
    )
    group.add_argument(
        "--lost-after",
        metavar="S",
        type=_positive,
        default=20,
        help="seconds without a sign of life after which a process counts as gone (20)",
    )


def _several_hosts(options: argparse.Namespace) -> bool:
    return options.distributed or options.coordinator is not None


def _check_hosts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if (options.coordinator is None) != (options.process is None):
        parser.error("--coordinator HOST:PORT and --process I/N go together")
    if options.coordinator is not None and options.distributed:
        parser.error("--distributed finds out what --coordinator and --process say; leave one out")
    if _several_hosts(options) and options.output is None:
        parser.error("several hosts write one file; name it with --output FILE")
    if _several_hosts(options) and options.shard is not None:
        parser.error("several hosts share the images out themselves; leave --shard out")


def _on_hosts(options: argparse.Namespace, run: Callable[[Any], int]) -> Command:
    """The command as one of several processes, if the options say so."""

    def command() -> int:
        if not _several_hosts(options):
            return run(None)
        from vit_cli.runs.supervise import Cluster, supervised

        cluster = Cluster(
            options.coordinator, options.process, options.start_timeout, options.lost_after
        )
        return supervised(cluster, lambda: run(cluster))

    return command


def _add_precision_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--param-dtype",
        choices=_DTYPES,
        help="how the parameters are held in the device's memory (as in the file)",
    )
    parser.add_argument(
        "--weights",
        choices=("int8",),
        help="hold the kernels of the blocks as 8-bit integers, a quarter of float32's memory; "
        "probabilities change in their second digit",
    )


def _precision(options: argparse.Namespace) -> dict[str, Any]:
    named = ("param_dtype", "weights")
    return {name: getattr(options, name) for name in named if getattr(options, name)}


def _add_stream_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        help="images that go through the model at once (8 on a CPU, 64 elsewhere)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted --output stopped"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        help="only the I-th of N parts of the images, I from 1; for several machines",
    )


def _hub(options: argparse.Namespace) -> dict[str, Any]:
    named = ("revision", "subfolder", "local_files_only")
    return {name: getattr(options, name) for name in named if getattr(options, name)}


# -- subcommands


def _of_a_stream(options: argparse.Namespace) -> dict[str, Any]:
    """What `vit predict` and `vit features` are told alike."""
    return {
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "resume": options.resume,
        "force": options.force,
        "shard": options.shard,
        "devices": options.devices,
        "model_parallel": options.model_parallel,
        "hub": {**_precision(options), **_hub(options)},
    }


def _predict(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit predict",
        "Classify images: print the likeliest classes of each, in the order given. What cannot be "
        "read is named on standard error and skipped; the exit code is then 1.",
        usage="vit predict [options] IMAGE|DIR ...",
    )
    _add_model_options(parser)
    _add_precision_options(parser)
    parser.add_argument(
        "--top-k", metavar="N", type=_positive, default=5, help="classes to print an image (5)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line, for each image"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the results to a .jsonl, .csv or .parquet file instead",
    )
    _add_stream_options(parser)
    _add_device_options(parser)
    _add_host_options(parser)
    _add_pixel_option(parser)
    _add_hub_options(parser)
    options, names = _parse(
        parser,
        arguments,
        "IMAGE|DIR",
        "image files, or folders to look for image files in, at any depth",
    )
    if not names:
        parser.error("name at least one image or folder")
    if options.output is None and (options.resume or options.force):
        parser.error("--resume and --force are for --output FILE")
    _check_hosts(parser, options)

    def run(cluster: Any) -> int:
        from vit_cli.commands.predict import predict

        return predict(
            names,
            options.model,
            top_k=options.top_k,
            as_json=options.json,
            output=options.output,
            cluster=cluster,
            **_of_a_stream(options),
        )

    return _limited(options.max_pixels, _on_hosts(options, run))


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"must be numbers of blocks with commas between; given {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _features(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit features",
        "Write what a network makes of images, before any classifier: one vector an image in one "
        "file. Any model will do, with a classifier or without. What cannot be read is named on "
        "standard error and in the file; the exit code is then 1.",
        usage="vit features [options] IMAGE|DIR ... --output FILE",
    )
    _add_model_options(parser)
    _add_precision_options(parser)
    parser.add_argument("--output", metavar="FILE", help=".npz, .parquet or .safetensors file")
    parser.add_argument(
        "--layers",
        metavar="L,...",
        type=_layers,
        default=(-1,),
        help="blocks, the first is 0; -1 is the last, after the final norm (-1)",
    )
    parser.add_argument(
        "--pool",
        choices=("cls", "mean", "none"),
        default="cls",
        help="the class token, the mean of the patches, or all tokens (cls)",
    )
    parser.add_argument(
        "--store-dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the numbers in the file (float32)",
    )
    _add_stream_options(parser)
    _add_device_options(parser)
    _add_host_options(parser)
    _add_pixel_option(parser)
    _add_hub_options(parser)
    options, names = _parse(
        parser,
        _with_value(arguments, "--layers"),
        "IMAGE|DIR",
        "image files, or folders to look for image files in, at any depth",
    )
    if not names:
        parser.error("name at least one image or folder")
    if options.output is None:
        parser.error("--output FILE is needed")
    _check_hosts(parser, options)

    def run(cluster: Any) -> int:
        from vit_cli.commands.features import features

        return features(
            names,
            options.model,
            options.output,
            layers=options.layers,
            pool=None if options.pool == "none" else options.pool,
            store_dtype=options.store_dtype,
            cluster=cluster,
            **_of_a_stream(options),
        )

    return _limited(options.max_pixels, _on_hosts(options, run))


def _with_value(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments with an option and what follows it as one: argparse takes `-1,-2` for an
    option of its own."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == option and "--" not in joined:
            joined[-1] = f"{option}={argument}"
        else:
            joined.append(argument)
    return joined


def _info(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit info",
        "Show versions, devices and precision; with a model, what it is. The weights of a model "
        "on the Hub are described if they were downloaded before; only its small files are "
        "fetched.",
        usage="vit info [options] [MODEL]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--batch",
        metavar="N",
        type=_positive,
        default=1,
        help="for N images at once: which attention kernel runs here, and why (1)",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of that computation (float32)"
    )
    _add_hub_options(parser)
    options, names = _parse(parser, arguments, "MODEL", "folder, weights file, or name on the Hub")
    if len(names) > 1:
        parser.error(f"wanted one model; given {', '.join(names)}")

    def command() -> int:
        from vit_cli.commands.info import info

        return info(
            names[0] if names else None,
            as_json=options.json,
            batch=options.batch,
            dtype=options.dtype,
            hub=_hub(options),
        )

    return command


def _size(text: str) -> int | tuple[int, int]:
    """ "384" or "384x512" (height x width)."""
    parts = [_positive(part) for part in text.lower().split("x")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"must be N or HxW; given {text!r}")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _convert(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit convert",
        "Convert a checkpoint. TARGET is a file (.safetensors, .msgpack, .npz, .pth) or a folder, "
        "which also gets config.json and preprocessor_config.json. Every tensor is accounted for, "
        "the result is read again and compared, and only then takes its place.",
        usage="vit convert [options] SOURCE TARGET",
    )
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help=f"format to write: {', '.join(_WRITTEN)}; by default what the suffix says, and hub "
        "for a folder",
    )
    parser.add_argument(
        "--from", dest="from_", metavar="FORMAT", help="format of the source, if it cannot be told"
    )
    parser.add_argument(
        "--dtype", choices=(*_DTYPES, "float64"), help="of the result; by default the source's"
    )
    parser.add_argument(
        "--num-labels", metavar="N", type=_positive, help="name the N classes LABEL_0, LABEL_1 ..."
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes: one a line, or JSON"
    )
    parser.add_argument(
        "--image-size",
        metavar="N|HxW",
        type=_size,
        help="resample the positions to another image size, by the family's own rule",
    )
    parser.add_argument(
        "--heads", metavar="N", type=_positive, help="attention heads, if nothing says how many"
    )
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="a field of the configuration that wins over what the source implies, such as "
        "hidden_act=gelu; may be repeated",
    )
    parser.add_argument(
        "--preprocessing",
        metavar="FILE",
        help="preprocessor_config.json, or a model with one, instead of what the source implies",
    )
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        action="append",
        default=[],
        help="regular expression of names in the source to leave aside; may be repeated",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="10GB", help="largest file of a folder (10GB)"
    )
    parser.add_argument("--dry-run", action="store_true", help="do all but writing")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the result again, compare every tensor, and run source and result on one image",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    _add_hub_options(parser)
    options, names = _parse(parser, arguments, "SOURCE TARGET", "what to convert, and to where")
    if len(names) != 2:
        parser.error(f"wanted SOURCE and TARGET; given {', '.join(names) or 'nothing'}")

    def command() -> int:
        from vit_cli.commands.convert import convert

        return convert(
            names[0],
            names[1],
            to=options.to,
            from_=options.from_,
            dtype=options.dtype,
            num_labels=options.num_labels,
            labels=options.labels,
            image_size=options.image_size,
            heads=options.heads,
            settings=options.set,
            preprocessing=options.preprocessing,
            ignore=options.ignore,
            max_shard_size=options.max_shard_size,
            dry_run=options.dry_run,
            verify=options.verify,
            force=options.force,
            as_json=options.json,
            hub=_hub(options),
        )

    return command


def _inspect(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit inspect",
        "Show what a weights file holds: format, family, sizes, what is odd about it, and its "
        "first tensors. No weight is read.",
        usage="vit inspect [options] FILE",
    )
    parser.add_argument(
        "--from", dest="from_", metavar="FORMAT", help="format of the file, if it cannot be told"
    )
    parser.add_argument(
        "--lines", metavar="N", type=_positive, default=10, help="tensors to list (10)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with every tensor"
    )
    _add_hub_options(parser)
    options, names = _parse(
        parser, arguments, "FILE", "weights file, index of shards, folder, or name on the Hub"
    )
    if len(names) != 1:
        parser.error(f"wanted one file; given {', '.join(names) or 'nothing'}")

    def command() -> int:
        from vit_cli.commands.inspect import inspect

        return inspect(
            names[0],
            format=options.from_,
            lines=options.lines,
            as_json=options.json,
            hub=_hub(options),
        )

    return command


def _list_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse_list(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for name in text.split(",") if name))
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            raise argparse.ArgumentTypeError(
                f"must be some of {', '.join(known)}, with commas between; given {text!r}"
            )
        return names

    return parse_list


def _verify(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit verify",
        "Compare the Flax and the PyTorch twin of a checkpoint, or two checkpoints, stage by "
        "stage. Where a stage is outside its bound, say which known cause makes it agree. The "
        "exit code is 0 within bounds, 1 outside, 2 if it could not run.",
        usage="vit verify [options] A [B]",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="images to compare on; without it random numbers"
    )
    parser.add_argument(
        "--device",
        metavar="NAMES",
        type=_list_of(("cpu", "gpu", "tpu", "all")),
        default=("cpu",),
        help="cpu, gpu, tpu or all, with commas between (cpu); tpu on a machine without one "
        "compiles with XLA's TPU compiler and checks what it says",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAMES",
        type=_list_of((*_DTYPES, "float64")),
        help="float64, float32, bfloat16, float16, with commas between (float32)",
    )
    parser.add_argument(
        "--image-size", metavar="N|HxW", type=_size, help="other than the model's; of random images"
    )
    parser.add_argument("--batch", metavar="N", type=_positive, default=2, help="random images (2)")
    parser.add_argument(
        "--gradients", action="store_true", help="compare the gradient of every parameter too"
    )
    parser.add_argument("--report", metavar="FILE", help="write a report: .html, .json or .md")
    parser.add_argument(
        "--from", dest="from_", metavar="FORMAT", help="format of the weights, if it cannot be told"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_pixel_option(parser)
    _add_hub_options(parser)
    options, names = _parse(
        parser, arguments, "A [B]", "folders, weights files, or names on the Hub"
    )
    if len(names) not in (1, 2):
        parser.error(f"wanted one or two models; given {', '.join(names) or 'nothing'}")

    def command() -> int:
        from vit_cli.commands.verify import verify

        return verify(
            names[0],
            names[1] if len(names) == 2 else None,
            images=options.images,
            devices=options.device,
            dtypes=options.dtype,
            image_size=options.image_size,
            batch=options.batch,
            gradients=options.gradients,
            report=options.report,
            as_json=options.json,
            format=options.from_,
            hub=_hub(options),
        )

    return _limited(options.max_pixels, command)


def _attention(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit attention",
        "Draw what the class token looks at over the image as the model sees it: the image, the "
        "mean of the heads and each head of a block; or one head, or all blocks together.",
        usage="vit attention [options] IMAGE --output FILE",
    )
    _add_model_options(parser)
    parser.add_argument("--output", metavar="FILE", help=".png, .jpg or .webp file to write")
    parser.add_argument(
        "--layer", metavar="L", type=int, help="block, the first is 0 (-1: the last)"
    )
    parser.add_argument("--head", metavar="H", type=int, help="one head alone")
    parser.add_argument(
        "--rollout", action="store_true", help="over all blocks (Abnar and Zuidema 2020)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    _add_pixel_option(parser)
    _add_hub_options(parser)
    options, names = _parse(parser, arguments, "IMAGE", "image file")
    if len(names) != 1:
        parser.error(f"wanted one image; given {', '.join(names) or 'nothing'}")
    if options.output is None:
        parser.error("--output FILE is needed")
    if options.rollout and options.head is not None:
        parser.error("--rollout takes all heads together; leave --head out")
    if options.rollout and options.layer is not None:
        parser.error("--rollout takes all blocks together; leave --layer out")

    def command() -> int:
        from vit_cli.commands.attention import attention

        return attention(
            names[0],
            options.model,
            options.output,
            layer=-1 if options.layer is None else options.layer,
            head=options.head,
            rollout=options.rollout,
            dtype=options.dtype,
            force=options.force,
            hub=_hub(options),
        )

    return _limited(options.max_pixels, command)


def _bench(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit bench",
        "Measure images a second: of the network alone, beside the matrix products it is made of, "
        "and of a stream of image files, with where its time goes.",
        usage="vit bench [options] [IMAGE|DIR ...]",
    )
    _add_model_options(parser)
    parser.add_argument(
        "--batch-sizes",
        metavar="N,...",
        type=_sizes,
        help="images at once; the stream takes the last (1,8,32 on a CPU, 1,64,512 elsewhere)",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=_positive, default=5, help="of each measurement (5)"
    )
    parser.add_argument("--workers", metavar="N", type=_positive, help="threads that read images")
    parser.add_argument(
        "--normalize-on-device", action="store_true", help="send 8-bit pixels to the device"
    )
    parser.add_argument(
        "--fast-decode", action="store_true", help="decode large JPEGs at a fraction of their size"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_pixel_option(parser)
    _add_hub_options(parser)
    options, names = _parse(
        parser, arguments, "IMAGE|DIR", "image files for the stream, or folders"
    )

    def command() -> int:
        from vit_cli.commands.bench import bench

        own = {"workers": options.workers, "fast_decode": options.fast_decode}
        return bench(
            names,
            options.model,
            batch_sizes=options.batch_sizes,
            rounds=options.rounds,
            dtype=options.dtype,
            options={**own, "normalize_on_device": options.normalize_on_device},
            as_json=options.json,
            hub=_hub(options),
        )

    return _limited(options.max_pixels, command)


def _sizes(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _batch(text: str) -> int | str:
    if text == "dynamic":
        return text
    try:
        return _positive(text)
    except argparse.ArgumentTypeError:
        message = f"must be a positive integer or dynamic; given {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _export(arguments: Sequence[str]) -> Command:
    parser = _parser(
        "vit export",
        "Write a model as one file that runs without Flax and without this package's networks: a "
        "program of StableHLO for JAX (.jaxexport), or ONNX (.onnx), with its weights, "
        "preprocessing and labels. The file is run and compared with the model, and only then "
        "takes its place.",
        usage="vit export [options] MODEL OUT",
    )
    parser.add_argument("--to", choices=("jax", "onnx"), help="by default what the suffix says")
    parser.add_argument(
        "--platforms",
        metavar="NAMES",
        type=_list_of(_PLATFORMS),
        help="what the program is for: cpu, cuda, rocm, tpu, with commas between (cpu,cuda,tpu)",
    )
    parser.add_argument(
        "--batch",
        metavar="N|dynamic",
        type=_batch,
        default="dynamic",
        help="images a call takes: a number, or dynamic for any (dynamic)",
    )
    parser.add_argument(
        "--output",
        choices=("logits", "features"),
        default="logits",
        help="logits, or features for a model without a classifier: the class token after the last "
        "norm (logits)",
    )
    parser.add_argument(
        "--input",
        choices=("float32", "uint8"),
        help="float32 pixels, rescaled and normalised, or uint8 ones, for which the program does "
        "that (float32)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="what the model computes in (float32)")
    parser.add_argument(
        "--from", dest="from_", metavar="FORMAT", help="format of the weights, if it cannot be told"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the file and compare it with the model, and with the PyTorch twin where torch is "
        "installed",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_hub_options(parser)
    options, names = _parse(parser, arguments, "MODEL OUT", "model, and the file to write")
    if len(names) != 2:
        parser.error(f"wanted MODEL and OUT; given {', '.join(names) or 'nothing'}")

    def command() -> int:
        from vit_cli.commands.export import export

        return export(
            names[0],
            names[1],
            to=options.to,
            platforms=options.platforms,
            batch=options.batch,
            output=options.output,
            input_dtype=options.input,
            dtype=options.dtype,
            format=options.from_,
            check=options.check,
            force=options.force,
            as_json=options.json,
            hub=_hub(options),
        )

    return command


_SUBCOMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], Command]]] = {
    "predict": ("classify images", _predict),
    "features": ("what a model makes of images, in a file", _features),
    "attention": ("where a model looks, over the image", _attention),
    "convert": ("turn a checkpoint into another layout", _convert),
    "export": ("a model as a program for JAX or ONNX", _export),
    "bench": ("images a second, and where the time goes", _bench),
    "inspect": ("what a weights file holds", _inspect),
    "verify": ("compare twins or checkpoints, stage by stage", _verify),
    "info": ("versions, devices and precision; what a model is", _info),
}


# -- the command itself


def parse(arguments: Sequence[str]) -> Command:
    """The call that the arguments ask for. Help and version are printed, not called.

    Raises:
        InputError: the arguments are not understood.
    """
    try:
        if arguments and arguments[0] in _SUBCOMMANDS:
            return _SUBCOMMANDS[arguments[0]][1](arguments[1:])
        return _top(arguments)
    except SystemExit:  # how argparse ends after it has printed the help
        return _nothing


def _top(arguments: Sequence[str]) -> Command:
    width = max(map(len, _SUBCOMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (what, _) in _SUBCOMMANDS.items()]
    parser = _parser(
        "vit",
        "Vision Transformers on JAX.",
        usage="vit [-h] [--version] COMMAND ...",
        epilog="\n".join(
            ["commands:", *lines, "", "`vit COMMAND --help` shows the options of a command."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    options, rest = parser.parse_known_args(arguments)
    if options.version:
        from vit_common.versions import package_version

        print(f"vit {package_version()}")
        return _nothing
    if rest:
        what = "option" if rest[0].startswith("-") else "command"
        wanted = f"; wanted one of {', '.join(_SUBCOMMANDS)}" if what == "command" else ""
        parser.error(f"no such {what}: {rest[0]}{wanted}")
    parser.print_help()
    return _nothing


def _nothing() -> int:
    return 0
