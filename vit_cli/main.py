"""`main`: the command `vit`. It finds the file of a subcommand in `vit_cli.commands`, has it add
its options, and runs it.

Nothing heavy is imported here or at the top of a command: `vit --help` and `vit predict --help`
answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence

from vit_cli.options import Parser, did_you_mean, pixels_limited
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.guard import guarded, prepare_streams
from vit_cli.terminal.interrupt import exits_at_once
from vit_cli.terminal.messages import show_warning
from vit_common.errors import DeviceError, ViTError

_COMMANDS = {
    "train": "fine-tune a model on images of your own, or train one from nothing",
    "predict": "classify images",
    "zeroshot": "classify images by texts, with a model of both such as CLIP",
    "features": "write image embeddings to a file",
    "evaluate": "measure how good a classifier is on labelled images",
    "probe": "measure features with k-NN and logistic regression",
    "attention": "draw where a model looks in an image",
    "convert": "convert a checkpoint to another format",
    "export": "write a model as a program for JAX or ONNX",
    "bench": "measure images per second, and where the time goes",
    "inspect": "show what a weights file holds",
    "verify": "compare twins or checkpoints, stage by stage",
    "info": "show versions, devices and precision, or describe a model",
}
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
    prepare_streams()
    with exits_at_once(), warnings.catch_warnings():
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
        command = importlib.import_module(f"vit_cli.commands.{arguments[0]}")
        parser = Parser(f"vit {arguments[0]}")
        command.add_options(parser)
        options = parser.parse(arguments[1:])
    except SystemExit:  # how argparse ends after it has printed the help
        return lambda: DONE

    def run() -> int:
        try:
            with pixels_limited(options):
                return command.run(options)
        except Exception as error:
            out_of_memory = _out_of_memory(parser, error)
            if out_of_memory is None:
                raise
            raise out_of_memory from error

    return run


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
