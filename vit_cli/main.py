"""`main`: runs the command `vit`, and turns whatever goes wrong into one line and an exit code.

Nothing heavy is imported here or in `parser.py`: `vit --help` and `vit --version` answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from vit_cli.terminal.exit_codes import COULD_NOT_RUN, PIPE_CLOSED
from vit_cli.terminal.interrupt import exits_at_once
from vit_cli.terminal.messages import one_line, say, show_warning

_OUTPUT_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the command's own name; None means those of this process.

    Returns:
        The exit code: 0, or 1 if some of the images failed, 2 if the command could not run at
        all, 130 if it was interrupted, 141 if the reader of its output went away.
    """
    _prepare_streams()
    with exits_at_once(), warnings.catch_warnings():
        warnings.showwarning = show_warning
        return guarded(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def guarded(run: Callable[[], int]) -> int:
    """What `run` returns, or the exit code of what it raises, which is said."""
    try:
        code = run()
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        code = PIPE_CLOSED
    except Exception as error:
        code = COULD_NOT_RUN
        _explain(error)
    return code


def _run(arguments: Sequence[str]) -> int:
    from vit_cli.options import parse

    return parse(arguments)()


def _explain(error: Exception) -> None:
    """One line for any error; all of it with VIT_DEBUG set."""
    from vit_common.errors import ViTError
    from vit_flax.last_words import is_out_of_memory

    if os.environ.get("VIT_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ViTError):
        say("error", str(error))
    elif isinstance(error, OSError) and error.errno in _OUTPUT_FAILED:
        say("error", f"the output cannot be written ({error.strerror}).")
        _discard_output()
    elif is_out_of_memory(error):
        say("error", "out of memory; try a smaller --batch-size.")
    else:
        text = one_line(f"{type(error).__name__}: {error}")
        say("error", f"{text} (unexpected; VIT_DEBUG=1 shows where it comes from)")


# -- streams


def _prepare_streams() -> None:
    """Escape what a stream cannot encode; where a stream was closed, write to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Keep Python from writing what is left in the buffer when it exits, and failing again."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream of a test has no descriptor
        pass
    finally:
        os.close(null)
