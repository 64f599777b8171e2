"""Exit codes of the command."""

DONE = 0
SOME_FAILED = 1
"""Some images, or folders of images, could not be read; all others were."""
COULD_NOT_RUN = 2
"""Nothing was done: an option, the model or the environment is wrong."""
DIVERGED = 3
"""Training stopped at a step whose loss or gradients are not finite."""
SAVED = 75
"""Training was asked to stop, by SIGTERM or Ctrl-C, and is saved: the same command with --resume
goes on. (75 is EX_TEMPFAIL of sysexits.h: try again later.)"""
INTERRUPTED = 130
"""What shells give to a command that SIGINT ended."""
PIPE_CLOSED = 141
"""What shells give to a command that SIGPIPE ended."""
