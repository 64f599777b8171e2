"""The parser of a command, and the options that several commands share.

A group is one function that adds its options, and, where they mean something together, one class
that holds what was given. argparse rather than typer: `vit predict --help` takes 0.08 s of
processor time with argparse and 0.33 s with typer, which loads pydantic (bare Python: 0.02 s).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Self

from vit_common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vit_cli.runs.supervise import Cluster

# As `vit_common.config` has them; repeated here so that `--help` need not load numpy.
DTYPES = ("float32", "bfloat16", "float16")
_NUMBERS = re.compile(r"-\d+(,-?\d+)*")

Options = argparse.Namespace
"""What was given: `names`, and one attribute for each option."""


class Parser(argparse.ArgumentParser):
    """The options of a command, and the names among and after them.

    Attributes:
        checks: called with the options; each may call `error`.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)
        self.checks: list[Callable[[Options], object]] = []

    def add_quiet(self) -> None:
        """--quiet, which every command has."""
        self.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            help="on standard error, only warnings and errors: no notes, no progress",
        )

    def add_names(
        self, metavar: str, help: str, *, least: int, most: int | None, wanted: str
    ) -> argparse.Action:
        """Take names, `least` to `most` of them.

        Args:
            metavar, help: as for any argument.
            least, most: how many; None is any number.
            wanted: how many and what, in the error: "one image".
        """
        action = self.add_argument("names", metavar=metavar, nargs="*", help=help)

        def check(options: Options) -> None:
            count = len(options.names)
            if count < least or (most is not None and count > most):
                given = ", ".join(options.names) or "nothing"
                self.error(f"wanted {wanted}; given {given}" if most else f"name {wanted}")

        self.checks.append(check)
        return action

    def parse(self, arguments: Sequence[str]) -> Options:
        """The options that are given; everything after `--` is a name.

        Raises:
            InputError: they are not understood, or do not go together.
            SystemExit: the help was asked for, and printed.
        """
        end = arguments.index("--") if "--" in arguments else len(arguments)
        options, unknown = self.parse_known_intermixed_args(_joined(arguments[:end]))
        if unknown:
            # argparse adds the names that follow an option it does not know.
            wrong = [each for each in unknown if each.startswith("-")] or unknown
            known = self._option_string_actions
            listed = [each + did_you_mean(each.partition("=")[0], known) for each in wrong]
            self.error(f"unrecognized arguments: {', '.join(listed)}")
        options.names.extend(arguments[end + 1 :])
        for check in self.checks:
            check(options)
        return options

    def has(self, option: str) -> bool:
        """Whether there is such an option."""
        return option in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}; see `{self.prog} --help`.")

    def print_help(self, file: Any = None) -> None:
        # argparse's own keeps quiet about a pipe that is closed or a disk that is full.
        (file or sys.stdout).write(self.format_help())


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """For the error about a word that is not known: ` (did you mean X?)` if one of the known words
    is like it, else nothing."""
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def _joined(arguments: Iterable[str]) -> list[str]:
    """The arguments, with `--layers -1,-2` as one: argparse takes `-1,-2` for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].startswith("--") and _NUMBERS.fullmatch(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


# -- kinds of values


def layer_numbers(text: str) -> tuple[int, ...]:
    """Numbers of blocks."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"must be numbers of blocks with commas between; given {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def positive(text: str) -> int:
    """A positive integer."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; given {text!r}")
    return number


def size(text: str) -> int | tuple[int, int]:
    """ "384" or "384x512" (height x width)."""
    parts = [positive(part) for part in text.lower().split("x")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"must be N or HxW; given {text!r}")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Some of the known names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for name in text.split(",") if name))
        if not names or any(name not in known for name in names):
            raise argparse.ArgumentTypeError(
                f"must be some of {', '.join(known)}, with commas between; given {text!r}"
            )
        return names

    return parse


def _shard(text: str) -> tuple[int, int]:
    """ "2/8" as (1, 8)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N; given {text!r}")
    return int(index) - 1, int(count)


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT; given {text!r}")
    return text


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise InputError(f"--set must be FIELD=VALUE; given {text!r}.")
    from vit_common.config import CONFIG_CLASSES  # only here: it loads numpy

    known = {"num_labels": 0, **{n: 0 for cls in CONFIG_CLASSES.values() for n in cls.fields}}
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else "; see a model's config.json."
        raise InputError(f"--set: no configuration has a field {name!r}{meant}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# -- which model, and how its files are read


def add_model(parser: Parser) -> None:
    """--model and --dtype."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="folder, weights file, or name on the Hub such as google/vit-base-patch16-224; "
        "without it, a small model of handwritten digits that comes with the package",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="compute dtype (default: float32)"
    )


def add_columns(group: Any) -> None:
    """Which columns of a table are read, in a group of options."""
    group.add_argument(
        "--image-column",
        metavar="NAME",
        help="column of a table with the images (default: the usual names, such as file)",
    )
    group.add_argument(
        "--label-column",
        metavar="NAME[,NAME]",
        help="column of a table with the labels (default: the usual names, such as label)",
    )


def add_reading(
    parser: Parser,
    *,
    image_size: str | None = "image size to run at: positions are resampled if the model was "
    "trained at another; if its files do not say which, the size it was trained at",
    fields: str = "--set",
    loads: bool = True,
) -> None:
    """What the files of a model do not say by themselves, and where on the Hub they are.

    Args:
        image_size: help of --image-size; None where it is something else in this command.
        fields: the option that overrides fields of the configuration.
        loads: whether the command loads the weights, so that it may have to leave some out.
    """
    group = parser.add_argument_group("reading a model's files")
    group.add_argument(
        "--from", dest="format", metavar="FORMAT", help="format of the weights, if not detected"
    )
    group.add_argument(
        "--heads", metavar="N", type=positive, help="number of attention heads, if not in the files"
    )
    if image_size is not None:
        group.add_argument(
            "--image-size",
            metavar="N|HxW",
            type=size,
            help=f"{image_size} (height x width)",
        )
    group.add_argument(
        fields,
        dest="fields",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="override a field of the configuration, such as hidden_act=gelu; may be repeated",
    )
    if loads:
        group.add_argument(
            "--ignore",
            metavar="PATTERN",
            action="append",
            default=[],
            help="regular expression of tensor names to leave out; may be repeated",
        )
    add_hub(parser)


def add_hub(parser: Parser) -> None:
    """Where on the Hub a model is."""
    group = parser.add_argument_group("models on the Hugging Face Hub")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    group.add_argument("--subfolder", metavar="DIR", help="folder of the model in its repository")
    group.add_argument(
        "--local-files-only",
        action="store_true",
        help="use only what is in the local cache; no network",
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the files of a model are read.

    Attributes:
        format: of the weights; None detects it.
        overrides: fields of the configuration.
        hub: `revision`, `subfolder` and `local_files_only`, those that were given.
        ignore: regular expressions of names of tensors that may be left out.
    """

    format: str | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    hub: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Options, *, resized: bool = False) -> Self:
        """What was given; with `resized`, --image-size is something else in this command."""
        overrides = dict(map(_field, options.fields))
        if options.heads is not None:
            overrides["num_attention_heads"] = options.heads
        if not resized and options.image_size is not None:
            overrides["image_size"] = options.image_size
        named = ("revision", "subfolder", "local_files_only")
        hub = {name: getattr(options, name) for name in named if getattr(options, name)}
        return cls(options.format, overrides, hub, tuple(getattr(options, "ignore", ())))

    @property
    def keywords(self) -> dict[str, Any]:
        """As `from_pretrained` takes them."""
        named = {"format": self.format, "ignore": self.ignore}
        given = {name: value for name, value in named.items() if value}
        return {**given, **self.overrides, **self.hub}

    @property
    def for_source(self) -> dict[str, Any]:
        """As `vit_convert.source.open_source` takes them."""
        return {"format": self.format, "overrides": self.overrides, **self.hub}


# -- images


def add_pixel_limit(parser: Parser) -> None:
    """--max-pixels; see `pixels_limited`."""
    parser.add_argument(
        "--max-pixels",
        metavar="N",
        type=positive,
        help="refuse larger images, which could unpack to gigabytes (default: 178956970)",
    )


@contextmanager
def pixels_limited(options: Options) -> Iterator[None]:
    """Set Pillow's limit for as long as a command runs, if --max-pixels was given."""
    most = getattr(options, "max_pixels", None)
    if most is None:
        yield
        return
    import PIL.Image

    before = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = (most + 1) // 2  # Pillow refuses beyond twice that
    try:
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = before


# -- precision


def add_precision(parser: Parser) -> None:
    """How parameters are held, and whether products are of integers: what `precision_of` reads."""
    parser.add_argument(
        "--param-dtype",
        choices=DTYPES,
        help="dtype of the parameters in the device's memory (default: as in the file)",
    )
    parser.add_argument(
        "--weights",
        choices=("int8",),
        help="hold the weight matrices of the blocks as 8-bit integers, in a quarter of float32's "
        "memory; probabilities change in their second digit",
    )
    parser.add_argument(
        "--activations",
        choices=("int8",),
        help="with --weights int8: quantise what these matrices are multiplied by as well, and "
        "multiply integers, which is faster",
    )

    def check(options: Any) -> None:
        if options.activations is not None and options.weights is None:
            parser.error(
                "--activations int8 needs weights in 8-bit integers to multiply by; add --weights "
                "int8"
            )

    parser.checks.append(check)


def precision_of(options: Any) -> dict[str, Any]:
    """What was given of the options of `add_precision`, as `from_pretrained` takes it."""
    names = ("param_dtype", "weights", "activations")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


# -- a stream of images


def add_batch_size(parser: Parser) -> None:
    """How many images go through the model at once."""
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        help="images that go through the model at once (default: 8 on a CPU, 64 elsewhere)",
    )


def add_batches(parser: Parser) -> None:
    """How many images go through the model at once, and where."""
    add_batch_size(parser)
    _add_devices(parser)


def _add_devices(parser: Any) -> None:
    """How many devices; to a parser, or to a group of its options."""
    parser.add_argument(
        "--devices",
        metavar="N",
        type=positive,
        help="devices of this machine to use (default: all)",
    )


def add_results(parser: Parser, what: str) -> None:
    """--top-k, and where the results go.

    Args:
        what: is listed of each image.
    """
    parser.add_argument(
        "--top-k", metavar="N", type=positive, default=5, help=f"{what} per image (default: 5)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line, one line per image"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the results to a .jsonl, .csv or .parquet file instead",
    )


def add_stream(parser: Parser, same: str) -> None:
    """Everything `StreamOptions` holds but `output`, whose formats depend on the command.

    Args:
        same: options of the command that a run can be resumed with only as they were.
    """
    parser.add_names(
        "IMAGE|DIR",
        "image files, or folders to search for image files at any depth",
        least=1,
        most=None,
        wanted="at least one image or folder",
    )
    add_model(parser)
    add_precision(parser)
    add_batch_size(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"continue an interrupted --output; requires the same model, precision, {same} and "
        "--shard or number of hosts",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        help="process only part I of N of the images, I from 1; for several machines",
    )
    add_pixel_limit(parser)
    group = parser.add_argument_group("several devices")
    _add_devices(group)
    group.add_argument(
        "--model-parallel",
        metavar="M",
        type=positive,
        default=1,
        help="split heads and MLP of the network over M devices, if it does not fit on one "
        "(default: 1)",
    )
    add_hosts(
        parser,
        "All see the same images under the same names. Process I of N does part I of them, as with "
        "--shard I/N, and writes a file of its own: out.I-of-N.parquet for --output out.parquet.",
        "each host writes a file; name it with --output FILE",
    )
    add_reading(parser)


def _resource(text: str) -> tuple[str, float]:
    name, equals, count = text.partition("=")
    try:
        number = float(count)
    except ValueError:
        number = 0.0
    if not (name and equals and 0 < number < float("inf")):
        raise argparse.ArgumentTypeError(f"must be NAME=N; given {text!r}")
    return name, number


def _amount(text: str) -> float:
    return _resource(f"x={text}")[1]


def add_ray(parser: Parser) -> None:
    """--on ray and what it takes."""
    group = parser.add_argument_group(
        "a Ray cluster",
        "The output is then a folder of Parquet files; images may be behind URIs that pyarrow "
        "opens (s3://..., gs://...), or named by a table.",
    )
    group.add_argument("--on", choices=("ray",), help="run on a cluster of Ray")
    group.add_argument(
        "--ray-address",
        metavar="A",
        help="cluster to join: auto, HOST:PORT or ray://HOST:PORT (default: start one on this "
        "machine)",
    )
    group.add_argument(
        "--actors",
        metavar="N",
        type=positive,
        help="copies of the model (default: one for each GPU, or for each machine)",
    )
    group.add_argument(
        "--actor-cpus", metavar="N", type=_amount, help="cores of the machine that each one gets"
    )
    group.add_argument("--actor-gpus", metavar="N", type=_amount, help="GPUs that each one gets")
    group.add_argument(
        "--actor-resource",
        metavar="NAME=N",
        type=_resource,
        action="append",
        default=[],
        help="another resource that each one gets, such as TPU=4; may be repeated",
    )
    group.add_argument("--image-column", metavar="NAME", help="column of a table with the images")

    def check(options: Options) -> None:
        own = ("ray_address", "actors", "actor_cpus", "actor_gpus", "actor_resource")
        named = [name for name in (*own, "image_column") if getattr(options, name)]
        if options.on is None:
            if named:
                parser.error(f"--{named[0].replace('_', '-')} is for --on ray")
            return
        if options.output is None:
            parser.error("--on ray writes a folder of Parquet files; name it with --output DIR")
        others = ("coordinator", "distributed", "shard", "resume", "devices", "json")
        if given := [name for name in others if getattr(options, name, None)]:
            parser.error(
                f"--{given[0]} does not go with --on ray, which shares the work out itself"
            )
        if options.model_parallel > 1:
            parser.error("--model-parallel does not go with --on ray")

    parser.checks.append(check)


def add_hosts(parser: Parser, sharing: str, writes: str) -> None:
    """--coordinator, --process, --distributed, and how long others are waited for.

    Args:
        sharing: what is said of images and output.
        writes: the error where there is no --output.
    """
    group = parser.add_argument_group("several hosts", f"Start the same command on each. {sharing}")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        type=_address,
        help="address of the first process, with a free port, where the others meet it",
    )
    group.add_argument(
        "--process", metavar="I/N", type=_shard, help="this is process I of N, I from 1"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="detect both, on TPU pods, under Slurm and under Open MPI",
    )
    group.add_argument(
        "--start-timeout",
        metavar="S",
        type=positive,
        default=300,
        help="seconds to wait for the other processes (default: 300)",
    )
    group.add_argument(
        "--lost-after",
        metavar="S",
        type=positive,
        default=20,
        help="seconds without a sign of life after which a process counts as gone (default: 20)",
    )

    def check(options: Options) -> None:
        several = options.distributed or options.coordinator is not None
        if (options.coordinator is None) != (options.process is None):
            parser.error("--coordinator HOST:PORT and --process I/N go together")
        if options.coordinator is not None and options.distributed:
            parser.error("--distributed detects --coordinator and --process; leave one out")
        if several and options.output is None:
            parser.error(writes)
        if several and getattr(options, "shard", None) is not None:
            parser.error("several hosts share the images out themselves; leave --shard out")

    parser.checks.append(check)


def cluster_of(options: Any) -> Cluster | None:
    """The processes that the options of `add_hosts` name; None where this one does all the work."""
    if not (options.distributed or options.coordinator is not None):
        return None
    from vit_cli.runs.supervise import Cluster

    return Cluster(options.coordinator, options.process, options.start_timeout, options.lost_after)


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What `vit predict` and `vit features` have in common; the options of `add_stream` by their
    names, and:

    Attributes:
        reading: how the model's files are read.
        output: file for the results; None is standard output.
        shard: (i, n): only part i of n of the images, counted from 0. The name of an image decides
            which part it is in.
        process: (i, n): this is process i of n, counted from 0.
    """

    names: list[str]
    reading: Reading = Reading()
    model: str | None = None
    dtype: str = "float32"
    param_dtype: str | None = None
    weights: str | None = None
    activations: str | None = None
    batch_size: int | None = None
    output: str | None = None
    resume: bool = False
    force: bool = False
    shard: tuple[int, int] | None = None
    devices: int | None = None
    model_parallel: int = 1
    coordinator: str | None = None
    process: tuple[int, int] | None = None
    distributed: bool = False
    start_timeout: int = 300
    lost_after: int = 20

    @classmethod
    def of(cls, options: Options) -> Self:
        """What was given."""
        named = [each.name for each in dataclasses.fields(cls) if each.name != "reading"]
        given = {name: getattr(options, name) for name in named}
        return cls(reading=Reading.of(options), **given)

    @property
    def cluster(self) -> Cluster | None:
        """The processes that share the work; None where this one does all of it."""
        return cluster_of(self)

    @property
    def precision(self) -> dict[str, Any]:
        """How the parameters are held and multiplied, where that was given."""
        return precision_of(self)

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, whatever is made of the images, and which images are meant: a run
        can be resumed only with the same."""
        named = {"format": self.reading.format, "ignore": [*self.reading.ignore]}
        read = {name: value for name, value in named.items() if value}
        return {
            "model": self.model,
            "revision": self.reading.hub.get("revision"),
            "subfolder": self.reading.hub.get("subfolder"),
            "dtype": self.dtype,
            **self.precision,
            **read,
            **self.reading.overrides,
            "shard": None if self.shard is None else f"{self.shard[0] + 1}/{self.shard[1]}",
        }
