"""Exit codes of the command."""

DONE = 0
SOME_FAILED = 1
"""Some images, or folders of images, could not be read; all others were."""
COULD_NOT_RUN = 2
"""Nothing was done: an option, the model or the environment is wrong."""
INTERRUPTED = 130
"""What shells give to a command that SIGINT ended."""
PIPE_CLOSED = 141
"""What shells give to a command that SIGPIPE ended."""
