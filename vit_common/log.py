"""The one logger of this project: `logging.getLogger("vit")`.

What a user should act on is a warning (`warnings`) or an error. The logger has the rest: what was
opened and compiled, and how long that took. Nothing is shown unless a program asks for it, by
`logging.basicConfig(level=logging.DEBUG)` or a handler of its own; the command shows it with
`VIT_DEBUG=1`. `logging.getLogger("vit").disabled = True` silences it.
"""

import logging

NAME = "vit"

logger = logging.getLogger(NAME)
logger.addHandler(logging.NullHandler())
