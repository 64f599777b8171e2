"""What does a training step cost on a slice of TPUs, by XLA's own TPU compiler?

    python benchmarks/tpu_training.py [--models base large] [--meshes 4x4 1x16]
        [--blocks each scan] [--remat none POLICY] [--table]

Compiles, and does not run: neither a TPU nor weights are needed, but `pip install
'.[bench,tpu-check]'` is. One step of AdamW on 1024 images over the 16 chips of a v5e-16 (the
topology v5e:4x4), bfloat16 with float32 parameters, on meshes of (data x fsdp). Writes
`results/tpu_training.json` after every row (other rows made with the same versions stay), and the
second table in `docs/tpu.md` if it has a place for it; `--table` writes that alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from typing import Any

from common import RESULTS, ROOT, parse, run_process, write_file

TOPOLOGY, CHIP, BATCH = "v5e:4x4", "v5e", 1024
KEY = ("model", "mesh", "remat", "blocks")
BEGIN, END = "<!-- training table: begin -->", "<!-- training table: end -->"


def compile_one(model: str, axes: str, remat: str, blocks: str, batch: str) -> dict[str, Any]:
    """Compile one step; `remat` is "none" or a policy, `blocks` "each" or "scan"."""
    from vit_common.presets import preset
    from vit_flax import tpu_check
    from vit_flax.hlo import exchanges

    config = preset(model, num_labels=1000)
    data, fsdp = map(int, axes.split("x"))
    policy = None if remat == "none" else remat
    texts = []
    with tpu_check.libtpu_environment():
        mesh = tpu_check.training_mesh(TOPOLOGY, data, fsdp)
        each = int(batch) // mesh.size
        built = tpu_check.training_step(
            config,
            mesh,
            batch=each,
            dtype="bfloat16",
            remat=policy,
            scan_layers=blocks == "scan",
        )

        def more(text: str) -> Any:
            texts.append(text)
            return tpu_check.exchange_check(text, config, mesh)

        program = tpu_check.check_program(
            *built, chip=CHIP, name="training step", batch=each, dtype="bfloat16", more=more
        )
    return {
        "model": model,
        "mesh": axes,
        "remat": remat,
        "blocks": blocks,
        "batch": int(batch),
        "flops_ratio": program.flops_ratio,
        "product_ratio": (program.product_flops or 0.0) / program.analytic_flops,
        "bytes_accessed": program.bytes_accessed,
        "argument_bytes": program.argument_bytes,
        "temporary_bytes": program.temporary_bytes,
        "memory_bytes": program.memory_bytes,
        "exchanges": dict(Counter(found.kind for text in texts for found in exchanges(text))),
        "compile_seconds": round(program.seconds, 1),
        "checks": {check.name: [check.passed, check.detail] for check in program.checks},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | data x fsdp | blocks | recomputed | products / analytic "
        "| parameters and moments, MB | temporary, GB | all memory, GB | communication |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=order):
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(row["exchanges"].items()))
        if not row["product_ratio"]:  # there is no program
            said = "; ".join(detail for passed, detail in row["checks"].values() if not passed)
        numbers = ["-"] * 4
        if row["product_ratio"]:
            numbers = [
                f"{row['product_ratio']:.4f}",
                f"{row['argument_bytes'] / 1e6:.0f}",
                f"{row['temporary_bytes'] / 1e9:.2f}",
                f"{row['memory_bytes'] / 1e9:.2f}",
            ]
        blocks = "one by one" if row["blocks"] == "each" else "scanned"
        remat = "nothing" if row["remat"] == "none" else row["remat"]
        cells = [row["model"], row["mesh"].replace("x", " x "), blocks, remat, *numbers, said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Small models first."""
    sizes = ("tiny", "small", "base", "large", "huge", "giant")
    return sizes.index(row["model"]), row["mesh"], row["blocks"], row["remat"]


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the table into `docs/tpu.md`, between its marks."""
    page = ROOT / "docs" / "tpu.md"
    if not page.exists() or BEGIN not in page.read_text():
        print(table(rows))
        return
    before, rest = page.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> None:
    """Run and write `results/tpu_training.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["base", "large"])
    parser.add_argument("--meshes", nargs="+", default=["4x4"], metavar="DATAxFSDP")
    parser.add_argument("--remat", nargs="+", default=["none"], help="none, or policies")
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=["each"],
        choices=["each", "scan"],
        help="each block compiled, or one that is run for all: much sooner compiled",
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="images, over all chips")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parse(parser, models=["tiny"], batch=16)
    if arguments.one:
        print(json.dumps(compile_one(*arguments.one)))
        return
    from vit_flax.tpu_check import versions

    known: dict[tuple[str, ...], dict[str, Any]] = {}
    path = RESULTS / "tpu_training.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if arguments.table or earlier["versions"] == versions():
            known = {tuple(r[name] for name in KEY): r for r in earlier["rows"]}
    if arguments.table:
        write_table([*known.values()])
        return
    choices = (arguments.models, arguments.meshes, arguments.remat, arguments.blocks)
    for job in itertools.product(*choices):
        command = [sys.executable, os.path.abspath(__file__), "--one", *job, str(arguments.batch)]
        row = json.loads(run_process(command)["stdout"].splitlines()[-1])
        known[job] = row
        print(" ".join(job), json.dumps(row), flush=True)
        if not arguments.quick:
            rows = sorted(known.values(), key=order)
            result = {"question": __doc__.splitlines()[0], "versions": versions(), "rows": rows}
            write_file("tpu_training", result)
    if not arguments.quick:
        write_table([*known.values()])


if __name__ == "__main__":
    main()
