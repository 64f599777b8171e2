"""`vit completion SHELL`: commands, options and names of files by the Tab key.

The shell asks the command itself what may come next, by argcomplete, so that the answer is always
that of the version that is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from vit_cli.options import Options, Parser, did_you_mean
from vit_cli.terminal.exit_codes import DONE
from vit_common.errors import InputError

SHELLS = ("bash", "zsh", "fish")
_MISSING = "completion needs argcomplete; run: pip install argcomplete"


def add_options(parser: Parser) -> None:
    parser.usage = f"vit completion {'|'.join(SHELLS)}"
    parser.description = (
        "Print what a shell needs to complete commands, options and file names. For bash, add "
        '`eval "$(vit completion bash)"` to ~/.bashrc; for zsh, `eval "$(vit completion zsh)"` to '
        "~/.zshrc after compinit; for fish: vit completion fish > "
        "~/.config/fish/completions/vit.fish"
    )
    known = ", ".join(SHELLS)
    names = parser.add_names("SHELL", known, least=1, most=1, wanted=f"one shell of {known}")
    names.completer = lambda **_: SHELLS  # type: ignore[attr-defined]

    def check(options: Options) -> None:
        given = options.names[0]
        if given not in SHELLS:
            parser.error(f"no such shell: {given}{did_you_mean(given, SHELLS)}; wanted {known}")

    parser.checks.append(check)


def run(options: Options) -> int:
    """Print the shell's part of the completion.

    Raises:
        InputError: argcomplete is not installed.
    """
    if importlib.util.find_spec("argcomplete") is None:
        raise InputError(f"{_MISSING}.")
    import argcomplete

    sys.stdout.write(argcomplete.shellcode(["vit"], shell=options.names[0]))
    return DONE


def complete(commands: Mapping[str, str], command: Callable[[str], ModuleType]) -> None:
    """Answer a shell that asks what may come next, and end the process.

    Args:
        commands: names of the commands, and what each does.
        command: the module of a command, by its name.
    """
    if importlib.util.find_spec("argcomplete") is None:
        sys.exit(1)  # nothing may be printed here: the shell would take it for an answer
    import argcomplete

    top = Parser("vit")
    top.add_argument("--version", action="store_true", help="show the version and exit")
    several = top.add_subparsers(parser_class=_named)  # type: ignore[call-overload]
    for name, what in commands.items():
        parser = several.add_parser(name, help=what)
        command(name).add_options(parser)
        parser.add_quiet()
    argcomplete.autocomplete(top, always_complete_options=False)


def _named(*, prog: str, **options: object) -> Parser:
    return Parser(prog, **options)
