"""`vit verify MODEL --device tpu` where there is no TPU: what XLA's TPU compiler says of the model.

The compiler runs in a process of its own. libtpu reads its settings when it is loaded, writes to
standard error as it likes, and ends the process where it meets a fault of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import one_line, say
from vit_common.errors import InputError, ViTError
from vit_common.families import config_class

if TYPE_CHECKING:
    from vit_flax.tpu_check import Program, TPUReport

# Modules are looked for where this process looks for them, whatever the current folder holds.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vit_cli.commands.tpu import child; child()"
)
_TITLES = (
    "chip",
    "program",
    "flops",
    "all flops",
    "accessed",
    "temporary",
    "memory",
    "of HBM",
    "compiled",
    "result",
)


def compile_for_tpu(
    model: str,
    *,
    batch: int,
    as_json: bool = False,
    format: str | None = None,
    hub: Mapping[str, Any] | None = None,
    chips: tuple[str, ...] = ("v5e", "v5p", "v6e"),
    dtype: str = "bfloat16",
    training: bool = True,
) -> int:
    """Compile a model for TPUs, check what the compiler says, and print a table. See
    `vit_flax.tpu_check.check`; no weights are read where a configuration says what the model is.

    Args:
        model: folder, weights file or Hub name; or a preset's name, such as "base", where no file
            has that name.
        batch: images on each chip.
        as_json: print one JSON object instead of the table.
        format: of the weights.
        hub: options of the Hub.
        chips: names of chips.
        dtype: of the computation.
        training: whether to compile a training step too.

    Returns:
        0 if every assertion holds, 1 if not.

    Raises:
        InputError: libtpu or optax is not installed, or the compiler process failed.
        ViTError: there is no such model.
    """
    from vit_flax.tpu_check import TPUReport, network, require_compiler

    require_compiler(training)
    config, teacher = network(model, format=format, hub=hub)
    request = {
        "model": model,
        "config": config.to_dict(),
        "family": config.model_type,
        "teacher": teacher,
        "chips": chips,
        "batch": batch,
        "dtype": dtype,
        "training": training,
    }
    found = TPUReport.from_dict(_run(request))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    return DONE if found.passed else SOME_FAILED


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler process answers; progress is said while it comes."""
    from vit_flax.tpu_check import LIBTPU_VARIABLES

    # Without a TPU, JAX itself needs the CPU only: it would look for the TPU, and complain.
    environment = {**os.environ, **LIBTPU_VARIABLES, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        answer: dict[str, Any] = {}
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # not ours: libtpu may write here too
                if isinstance(message, dict) and "progress" in message:
                    say(message["progress"])
                elif isinstance(message, dict):
                    answer = message
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if "report" in answer:
            return answer["report"]
        if "error" in answer:
            raise InputError(answer["error"])
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    raise InputError(
        f"the TPU compiler ended with code {process.returncode} and no answer"
        + (f"; its last words: {one_line(said[-1])}" if said else ".")
    )


def child() -> None:
    """The compiler process: a request on standard input, messages on standard output."""
    from vit_flax.tpu_check import check

    request = json.load(sys.stdin)
    config = config_class(request["family"]).from_dict(request["config"])
    if request["teacher"]:
        config.architectures = ["DeiTForImageClassificationWithTeacher"]

    def tell(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    try:
        found = check(
            config,
            chips=request["chips"],
            batch=request["batch"],
            dtype=request["dtype"],
            training=request["training"],
            progress=lambda text: tell(progress=text),
        )
    except ViTError as error:
        tell(error=str(error))
    else:
        tell(report={**found.to_dict(), "model": request["model"]})


# -- as text


def _print(found: TPUReport) -> None:
    print(f"{one_line(found.model)}, {found.programs[0].batch} images per chip, {found.dtype}")
    rows = [_TITLES, *map(_row, found.programs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    for program in found.programs:
        for check in program.checks:
            if not check.passed:
                what = f"{program.chip}, {program.name}: {check.name}"
                print(f"{what}: FAILED: {one_line(check.detail)}")
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    print(f"compiled, not run, with {versions}")
    print("every assertion holds" if found.passed else "some assertions FAILED")


def _row(program: Program) -> tuple[str, ...]:
    from vit_flax.tpu_check import CHIPS

    start, result = (program.chip, program.name), "pass" if program.passed else "FAILED"
    if not program.compiled:
        return (*start, *["-"] * 6, f"{program.seconds:.0f} s", result)
    products = program.product_flops
    share = "custom" if products is None else f"{products / program.analytic_flops:.4f}"
    return (
        *start,
        share,
        f"{program.flops_ratio:.4f}",
        _size(program.bytes_accessed),
        _size(program.temporary_bytes),
        _size(program.memory_bytes),
        f"{program.memory_bytes / 1e9 / CHIPS[program.chip].hbm_gb:.1%}",
        f"{program.seconds:.0f} s",
        result,
    )


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
