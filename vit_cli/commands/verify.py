"""`vit verify`: are the twins of a checkpoint, two checkpoints, or two training runs the same?"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from vit_cli.options import (
    DTYPES,
    Options,
    Parser,
    Reading,
    add_pixel_limit,
    add_reading,
    positive,
    some_of,
)
from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import one_line, say
from vit_common.errors import InputError, MissingFileError
from vit_common.images.find import find_images

_REPORTS = (".html", ".json", ".md")


def add_options(parser: Parser) -> None:
    parser.usage = "vit verify [options] A [B]"
    parser.description = (
        "Compare the Flax and the PyTorch twin of a checkpoint, or two checkpoints, stage by "
        "stage; with --training, two training runs of the twins, step by step. Where they differ, "
        "say which known cause makes them agree. The exit code is 0 within bounds, 1 outside, 2 if "
        "the comparison could not run."
    )
    parser.add_names(
        "A [B]",
        "folders, weights files, or names on the Hub",
        least=1,
        most=2,
        wanted="one or two models",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="images to compare on (default: random numbers)"
    )
    parser.add_argument(
        "--device",
        metavar="NAMES",
        type=some_of(("cpu", "gpu", "tpu", "all")),
        default=("cpu",),
        help="cpu, gpu, tpu or all, separated by commas (default: cpu); without a TPU, tpu "
        "compiles with XLA's TPU compiler and checks its report",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAMES",
        type=some_of((*DTYPES, "float64")),
        help="float64, float32, bfloat16, float16, separated by commas (default: float32; with "
        "--training: float64)",
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        type=positive,
        help="number of random images (default: 2); with --training, images in a batch "
        "(default: 16)",
    )
    parser.add_argument(
        "--gradients", action="store_true", help="compare the gradient of every parameter too"
    )
    parser.add_argument("--report", metavar="FILE", help="write a report: .html, .json or .md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("training runs")
    group.add_argument(
        "--training",
        metavar="STEPS",
        type=positive,
        help="train the Flax model with optax and its PyTorch twin with torch.optim, from the same "
        "weights on the same batches, and compare every step",
    )
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help="recipe of both runs (default: fine-tune); --set changes its settings too, such as "
        "optimizer=sgd",
    )
    group.add_argument(
        "--torch",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting or definition of the PyTorch run only, such as clip_rule=torch or "
        "schedule_offset=1; may be repeated",
    )
    add_pixel_limit(parser)
    add_reading(parser, image_size="size of the random images, other than the model's")


def run(options: Options) -> int:
    """Compare, print a table, and write a report if one is asked for.

    Returns:
        0 within bounds, 1 outside.

    Raises:
        ViTError: it could not run.
    """
    report, devices, dtypes = options.report, options.device, options.dtype
    first, second = (*options.names, None)[:2]
    if report is not None and Path(report).suffix not in _REPORTS:
        raise InputError(f"--report must end in {', '.join(_REPORTS)}; given {report!r}.")
    settings = _training_settings(options)
    reading = Reading.of(options, resized=True)
    if {"gpu", "all"} & set(devices):
        # JAX would take most of the GPU's memory when it starts, and leave other processes none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if devices == ("tpu",) and second is None and not _has("tpu"):
        given = {
            "--report": report is not None,
            "--gradients": options.gradients,
            "--image-size": options.image_size is not None,
            "--images": options.images is not None,
            "--heads, --set or --ignore": bool(reading.overrides or reading.ignore),
            "more than one --dtype": len(dtypes or ()) > 1,
            "--training": options.training is not None,
        }
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise InputError(
                "there is no TPU here, so that the model is only compiled for one; given "
                f"{names}, which that cannot take."
            )
        from vit_cli.commands.tpu import compile_for_tpu

        return compile_for_tpu(
            first,
            batch=options.batch or 2,
            as_json=options.json,
            format=reading.format,
            hub=reading.hub,
            dtype=dtypes[0] if dtypes else "bfloat16",
        )
    from vit_common.files.replace import check_target, write_text

    if report is not None:
        check_target(Path(report), force=True)
    pictures = None if options.images is None else _read(options.images)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("verifying needs the PyTorch twin; run: pip install torch") from error
    if "all" in devices:
        devices = tuple(name for name in ("cpu", "gpu", "tpu") if _has(name))
    if options.training is not None:
        found = _train(options, settings, devices, reading, pictures)
    else:
        from vit_torch.verify import verify

        side = options.image_size
        found = verify(
            first,
            second,
            images=pictures,
            devices=devices,
            dtypes=dtypes or ("float32",),
            image_size=(side, side) if isinstance(side, int) else side,
            batch=options.batch or 2,
            gradients=options.gradients,
            ignore=reading.ignore,
            **reading.for_source,
        )
    from vit_cli.commands import verify_report

    if options.json:
        print(verify_report.as_json(found), end="")
    else:
        _print(found)
    if report is not None:
        suffix = Path(report).suffix
        make = {
            ".html": verify_report.html,
            ".json": verify_report.as_json,
            ".md": verify_report.markdown,
        }
        write_text(report, make[suffix](found))
        say(f"wrote {report}")
    return DONE if found.passed else SOME_FAILED


def _training_settings(options: Options) -> dict[str, Any]:
    """Settings of the recipe among the values of --set, which they are taken out of.

    Raises:
        InputError: an option that goes with --training was given without it, or the reverse.
    """
    if options.training is None:
        alone = {"--recipe": options.recipe is not None, "--torch": bool(options.torch)}
        if names := ", ".join(name for name, given in alone.items() if given):
            raise InputError(f"{names} is for training runs; add --training STEPS.")
        return {}
    unused = {
        "a second model": len(options.names) > 1,
        "--gradients": options.gradients,
        "--image-size": options.image_size is not None,
    }
    if names := ", ".join(name for name, given in unused.items() if given):
        raise InputError(f"--training compares the two runs of one model; given {names} too.")
    from vit_common.config import CONFIG_CLASSES  # only here: it loads numpy
    from vit_common.recipes import SHORT_NAMES, Recipe, parse_settings

    fields = {name for kind in CONFIG_CLASSES.values() for name in kind.fields}
    known = {*SHORT_NAMES, *(field.name for field in dataclasses.fields(Recipe))} - fields
    mine = [text for text in options.fields if text.partition("=")[0] in known]
    options.fields = [text for text in options.fields if text not in mine]
    return parse_settings(mine)


def _train(
    options: Options,
    settings: dict[str, Any],
    devices: tuple[str, ...],
    reading: Reading,
    pictures: list[Any] | None,
) -> Any:
    """Train both twins and compare."""
    from vit_common.recipes import recipe
    from vit_torch.verify.definitions import parse_changes
    from vit_torch.verify.training import verify_training

    return verify_training(
        options.names[0],
        steps=options.training,
        recipe=recipe(options.recipe or "fine-tune", **settings),
        changes=parse_changes(options.torch),
        images=pictures,
        devices=devices,
        dtypes=options.dtype or ("float64",),
        batch=options.batch,
        ignore=reading.ignore,
        **reading.for_source,
    )


def _has(name: str) -> bool:
    import jax

    if name == "tpu" and not _libtpu_is_for_a_tpu():
        return False
    try:
        return bool(jax.local_devices(backend=name))
    except RuntimeError:
        return False


def _libtpu_is_for_a_tpu() -> bool:
    """Whether there is a TPU on this machine: libtpu without one is there to compile with, and
    would complain at length if it were asked for devices."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _read(place: str) -> list[Any]:
    from vit_common.images.pictures import load_image

    faults: list[str] = []
    files = list(find_images([place], faults.append, say))
    if faults or not files:
        raise MissingFileError(faults[0] if faults else f"{place}: no images there.")
    return [load_image(file) for file in files]


def _print(found: Any) -> None:
    from vit_cli.commands.verify_report import remarks, summary

    lines = summary(found)
    rich = False
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table

            rich = True
        except ImportError:
            pass
    if rich:
        table = Table(show_edge=False, header_style="bold")
        for title in lines[0]:
            table.add_column(title)
        for row in lines[1:]:
            style = "red" if row[-1] != "pass" else None
            table.add_row(*row, style=style)
        Console().print(table)
    else:
        widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
        for row in lines:
            print(
                "  ".join(
                    f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
    for row in found.rows:
        for number, remark in enumerate(remarks(row)):
            start = "  " if number else f"{row.device} {row.dtype}: "
            print(start + one_line(remark))
    for note in found.notes:
        print(one_line(note))
    print("within bounds" if found.passed else "OUTSIDE bounds")
