"""What goes wrong in a command becomes a line on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from vit_cli.terminal.exit_codes import COULD_NOT_RUN, PIPE_CLOSED
from vit_cli.terminal.messages import one_line, say
from vit_common.errors import ViTError

_OUTPUT_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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


def prepare_streams() -> None:
    """Escape what a stream cannot encode; where a stream was closed, write to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _explain(error: Exception) -> None:
    """A message for any error; its traceback too with VIT_DEBUG set."""
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


def _discard_output() -> None:
    """Keep Python from writing what is left in the buffer when it exits, and failing again."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream of a test has no descriptor
        pass
    finally:
        os.close(null)
