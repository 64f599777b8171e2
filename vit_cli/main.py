"""`main`: the command `vit`. It finds the file of a subcommand in `vit_cli.commands`, has it add
its options, and runs it.

Nothing heavy is imported here or at the top of a command: `vit --help` and `vit predict --help`
answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from vit_cli.options import Parser, did_you_mean, pixels_limited
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.guard import guarded, prepare_streams
from vit_cli.terminal.interrupt import exits_at_once
from vit_cli.terminal.messages import logged, quietly, show_warning
from vit_common.errors import DeviceError, ViTError
from vit_common.log import NAME as LOGGER

_COMMANDS = {
    "train": "fine-tune a model on images of your own, or train one from nothing",
    "predict": "classify images",
    "zeroshot": "classify images by texts, with a model of both such as CLIP",
    "features": "write image embeddings to a file",
    "search": "find the images most like a photo in a file of features",
    "evaluate": "measure how good a classifier is on labelled images",
    "probe": "measure features with k-NN and logistic regression",
    "serve": "serve a model over HTTP, with a page to try it on",
    "attention": "draw where a model looks in an image",
    "convert": "convert a checkpoint to another format",
    "export": "write a model as a program for JAX or ONNX",
    "bench": "measure images per second, and where the time goes",
    "inspect": "show what a weights file holds",
    "verify": "compare twins or checkpoints, stage by stage",
    "info": "show versions, devices and precision, or describe a model",
    "completion": "print what a shell needs to complete commands, options and file names",
}
_PLACES = {  # those not in vit_cli.commands
    "completion": "vit_cli.completion",
    "search": "vit_cli.search.command",
    "serve": "vit_cli.serve.command",
}
_NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
_EXIT_CODES = """exit codes:
  0    done
  1    some images could not be read, or `vit verify` found a difference out of bounds
  2    the command could not run: an option, the model, or the environment is wrong
  3    `vit train` stopped at a step that is not finite
  75   `vit train` was asked to stop and is saved; --resume goes on
  130  interrupted
  141  the reader of the output went away"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the command's own name; None means those of this process.

    Returns:
        The exit code, one of `vit_cli.terminal.exit_codes`.
    """
    if arguments is None and "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        from vit_cli.completion import complete

        complete(_COMMANDS, _command)
    prepare_streams()
    with exits_at_once(), warnings.catch_warnings(), logged(LOGGER):
        warnings.showwarning = show_warning
        return guarded(lambda: _parse(sys.argv[1:] if arguments is None else arguments)())


def _parse(arguments: Sequence[str]) -> Callable[[], int]:
    """The call that the arguments ask for. Help and version are printed, not called.

    Raises:
        InputError: the arguments are not understood.
    """
    try:
        if not arguments or arguments[0] not in _COMMANDS:
            return _top(arguments)
        command, parser = _command(arguments[0]), Parser(f"vit {arguments[0]}")
        command.add_options(parser)
        parser.add_quiet()
        options = parser.parse(arguments[1:])
    except SystemExit:  # how argparse ends after it has printed the help
        return lambda: DONE

    def run() -> int:
        try:
            with pixels_limited(options), quietly(options.quiet), _without_bars(options.quiet):
                return command.run(options)
        except Exception as error:
            out_of_memory = _out_of_memory(parser, error)
            if out_of_memory is None:
                raise
            raise out_of_memory from error

    return run


def _command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(_PLACES.get(name, f"vit_cli.commands.{name}"))


@contextlib.contextmanager
def _without_bars(quiet: bool) -> Iterator[None]:
    """With --quiet, downloads from the Hub show no progress either."""
    before = os.environ.get(_NO_BARS)
    if quiet:
        os.environ[_NO_BARS] = "1"  # read when huggingface_hub is imported
    try:
        yield
    finally:
        if quiet and before is None:
            os.environ.pop(_NO_BARS, None)
        elif quiet and before is not None:
            os.environ[_NO_BARS] = before


def _out_of_memory(parser: Parser, error: Exception) -> DeviceError | None:
    """An error that advises the option this command has, if memory was what ran out."""
    from vit_flax.last_words import is_out_of_memory

    if isinstance(error, ViTError) or not is_out_of_memory(error):
        return None
    batch = (name for name in ("--batch-size", "--batch-sizes", "--batch") if parser.has(name))
    return DeviceError(f"out of memory; try a smaller {next(batch, 'model')}.")


def _top(arguments: Sequence[str]) -> Callable[[], int]:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in _COMMANDS.items()]
    parser = Parser(
        "vit",
        description="Vision Transformers on JAX.",
        usage="vit [-h] [--version] COMMAND ...",
        epilog="\n".join(
            [
                "commands:",
                *lines,
                "",
                "`vit COMMAND --help` shows the options of a command.",
                "",
                _EXIT_CODES,
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    options, rest = parser.parse_known_args(arguments)
    if options.version:
        from vit_common.versions import package_version

        print(f"vit {package_version()}")
    elif rest:
        what = "option" if rest[0].startswith("-") else "command"
        wanted = f"; wanted one of {', '.join(_COMMANDS)}" if what == "command" else ""
        known = _COMMANDS if what == "command" else ("--help", "--version")
        parser.error(f"no such {what}: {rest[0]}{did_you_mean(rest[0], known)}{wanted}")
    else:
        parser.print_help()
    return lambda: DONE
