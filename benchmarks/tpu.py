"""What does a forward pass cost on a TPU, by XLA's own TPU compiler?

    python benchmarks/tpu.py [--models base large] [--chips v5e v6e] [--only "class token"]
        [--workers 2] [--table]

Compiles, and does not run: neither a TPU nor weights are needed, but `pip install
'.[bench,tpu-check]'` is. Each model at 1024 images on one chip, or the largest power of two
below it that fits, bfloat16 with float32 parameters; ViT-B also as `ImageClassifier` runs it,
beside Transformers' FlaxViT, and both with bfloat16 parameters too. Writes `results/tpu.json`
after every row (other rows made with the same versions stay), and the table in `docs/tpu.md`;
`--table` writes that alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import RESULTS, ROOT, parse, run_process, write_file

MODELS = ("base", "small", "tiny", "large", "huge", "giant")
OURS, THEIRS = "vit_flax", "Transformers FlaxViT"
HALF = ", bfloat16 parameters"
FRONT = ", last block for the class token"
BATCH = 1024
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def compile_one(contender: str, model: str, chip: str) -> dict[str, Any]:
    """Compile one model for one chip, at the largest batch that fits."""
    from vit_flax import tpu_check

    batch = BATCH
    with tpu_check.libtpu_environment():
        mesh = tpu_check.chip_mesh(chip, devices=1)
        while True:
            if contender.startswith(THEIRS):
                built = transformers_forward(model, mesh, batch)
            else:
                built = ours(model, mesh, batch, 1 if contender.endswith(FRONT) else None)
            if contender.endswith(HALF):
                built = with_half_parameters(built)
            program = tpu_check.check_program(
                *built, chip=chip, name="forward", batch=batch, dtype="bfloat16"
            )
            fits = all(check.passed for check in program.checks if check.name == "fits")
            if fits or batch == 1:
                break
            batch //= 2
    return {
        "contender": contender,
        "model": model,
        "chip": chip,
        "batch": batch,
        "flops_ratio": program.flops_ratio,
        "product_ratio": (program.product_flops or 0.0) / program.analytic_flops,
        "bytes_accessed": program.bytes_accessed,
        "temporary_bytes": program.temporary_bytes,
        "memory_bytes": program.memory_bytes,
        "compile_seconds": round(program.seconds, 1),
        "checks": {check.name: [check.passed, check.detail] for check in program.checks},
    }


def ours(model: str, mesh: Any, batch: int, front_tokens: int | None) -> Any:
    """The package's classifier; `ImageClassifier` runs it for one front token."""
    from vit_common.presets import preset
    from vit_flax import tpu_check

    config = preset(model, num_labels=1000)
    return tpu_check.forward(config, mesh, batch=batch, dtype="bfloat16", front_tokens=front_tokens)


def transformers_forward(model: str, mesh: Any, batch: int) -> Any:
    """Transformers' classifier of the same sizes, called as its users call it."""
    import jax
    import jax.numpy as jnp
    from transformers import FlaxViTForImageClassification, ViTConfig

    from vit_common.flops import forward_flops
    from vit_common.presets import preset
    from vit_flax import tpu_check
    from vit_flax.sharding import batch_sharding, replicated

    config = preset(model, num_labels=1000)
    theirs = FlaxViTForImageClassification(
        ViTConfig(**config.to_dict()), dtype=jnp.bfloat16, _do_init=False
    )
    everywhere, split = replicated(mesh), batch_sharding(mesh)
    jitted = jax.jit(
        lambda params, pixel_values: theirs(pixel_values, params=params).logits,
        in_shardings=(everywhere, split),
        out_shardings=split,
    )
    pixels = jax.ShapeDtypeStruct((batch, 3, *config.image_height_width), jnp.bfloat16)
    flops = batch * forward_flops(config)
    arguments = (dict(theirs.params_shape_tree), pixels)
    return tpu_check.Built(jitted, arguments, flops, mesh.size, may_communicate=False)


def with_half_parameters(built: Any) -> Any:
    """The same, with parameters in bfloat16."""
    import jax
    import jax.numpy as jnp

    params, *others = built.arguments
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    return built._replace(arguments=(params, *others))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | chip | batch | products / analytic | all operations / analytic "
        "| bytes accessed, GB | temporary, MB | all memory, GB | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=order):
        name = row["model"] + row["contender"].removeprefix(OURS)
        if row["contender"].startswith(THEIRS):
            name = f"{row['model']}, {row['contender']}"
        lines.append(
            f"| {name} | {row['chip']} | {row['batch']} | {row['product_ratio']:.4f} | "
            f"{row['flops_ratio']:.4f} | {row['bytes_accessed'] / 1e9:.1f} | "
            f"{row['temporary_bytes'] / 1e6:.0f} | {row['memory_bytes'] / 1e9:.2f} | "
            f"{row['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Small models first, ours before theirs."""
    sizes = ("tiny", "small", "base", "large", "huge", "giant")
    contender = row["contender"]
    place = (contender.endswith(HALF), contender.startswith(THEIRS), contender)
    return row["chip"], sizes.index(row["model"]), *place


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the table into `docs/tpu.md`."""
    page = ROOT / "docs" / "tpu.md"
    before, rest = page.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> None:
    """Run and write `results/tpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"])
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="ends of contenders' names")
    parser.add_argument("--workers", type=int, default=1, help="programs compiled at once")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parse(parser, models=["tiny"], chips=["v5e"])
    if arguments.one:
        print(json.dumps(compile_one(*arguments.one)))
        return
    from vit_flax.tpu_check import versions

    known: dict[tuple[str, ...], dict[str, Any]] = {}
    path = RESULTS / "tpu.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if arguments.table or earlier["versions"] == versions():
            known = {(r["contender"], r["model"], r["chip"]): r for r in earlier["rows"]}
    if arguments.table:
        write_table([*known.values()])
        return
    jobs = [(OURS, model, chip) for model in arguments.models for chip in arguments.chips]
    if "base" in arguments.models:
        jobs[len(arguments.chips) : len(arguments.chips)] = [
            (contender, "base", chip)
            for contender in (OURS + FRONT, THEIRS, OURS + HALF, THEIRS + HALF)
            for chip in arguments.chips
        ]
    jobs = [job for job in jobs if not arguments.only or job[0].endswith((*arguments.only,))]
    lock = threading.Lock()

    def run(job: tuple[str, str, str]) -> None:
        done = run_process([sys.executable, os.path.abspath(__file__), "--one", *job])
        row = json.loads(done["stdout"].splitlines()[-1])
        row["compiler_peak_mb"] = round(done["peak_mb"])
        with lock:
            known[job] = row
            rows = sorted(known.values(), key=order)
            result = {"question": __doc__.splitlines()[0], "versions": versions(), "rows": rows}
            if not arguments.quick:
                write_file("tpu", result)  # the compiler is the same on every machine
        print(" ".join(job), json.dumps(row), flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        for finished in [pool.submit(run, job) for job in jobs]:
            finished.result()
    if not arguments.quick and (ROOT / "docs" / "tpu.md").exists():
        write_table([*known.values()])


if __name__ == "__main__":
    main()
