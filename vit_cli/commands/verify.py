"""`vit verify`: are the twins of a checkpoint, or two checkpoints, the same?"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import one_line, say
from vit_common.errors import InputError, MissingFileError
from vit_common.files.replace import check_target, write_text
from vit_common.images.find import find_images

_REPORTS = (".html", ".json", ".md")


def verify(
    first: str,
    second: str | None,
    *,
    images: str | None = None,
    devices: tuple[str, ...] = ("cpu",),
    dtypes: tuple[str, ...] | None = None,
    image_size: Any = None,
    batch: int = 2,
    gradients: bool = False,
    report: str | None = None,
    as_json: bool = False,
    format: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> int:
    """Compare, print a table, and write a report if one is asked for.

    Args:
        first, second: models; without the second, the Flax and the PyTorch twin of the first.
        images: folder or file of images; None draws random numbers.
        devices: "cpu", "gpu", "tpu", "all".
        dtypes: as `vit_torch.verify.DTYPES`; None is float32, and bfloat16 where it is only
            compiled for a TPU.
        image_size: (height, width) or a side.
        batch: random images.
        gradients: compare gradients too.
        report: file to write, .html, .json or .md.
        as_json: print JSON instead of the table.
        format: of the weights.
        hub: options of the Hub.

    Returns:
        0 within bounds, 1 outside.

    Raises:
        ViTError: it could not run.
    """
    if report is not None and Path(report).suffix not in _REPORTS:
        raise InputError(f"--report must end in {', '.join(_REPORTS)}; given {report!r}.")
    if {"gpu", "all"} & set(devices):
        # JAX would take most of the GPU's memory when it starts, and leave other processes none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if devices == ("tpu",) and second is None and not _has("tpu"):
        given = {
            "--report": report is not None,
            "--gradients": gradients,
            "--image-size": image_size is not None,
            "--images": images is not None,
            "more than one --dtype": len(dtypes or ()) > 1,
        }
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise InputError(
                "there is no TPU here, so that the model is only compiled for one; given "
                f"{names}, which that cannot take."
            )
        from vit_cli.commands.tpu import compile_for_tpu

        dtype = dtypes[0] if dtypes else "bfloat16"
        return compile_for_tpu(
            first, batch=batch, as_json=as_json, format=format, hub=hub, dtype=dtype
        )
    if report is not None:
        check_target(Path(report), force=True)
    pictures = None if images is None else _read(images)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("verifying needs the PyTorch twin; run: pip install torch") from error
    if "all" in devices:
        devices = tuple(name for name in ("cpu", "gpu", "tpu") if _has(name))
    from vit_torch.verify import verify as run

    side = image_size if image_size is None or isinstance(image_size, tuple) else (image_size,) * 2
    found = run(
        first,
        second,
        images=pictures,
        devices=devices,
        dtypes=dtypes or ("float32",),
        image_size=side,
        batch=batch,
        gradients=gradients,
        format=format,
        **(hub or {}),
    )
    from vit_cli.commands import verify_report

    if as_json:
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
    files = list(find_images([place], faults.append))
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
