"""How far are the twins from each other, and from Transformers 4.57.6, in every family?

    python benchmarks/parity.py [--families vit beit ...] [--devices cpu gpu tpu] [--dtypes ...]

Networks of the width, depth and heads of ViT-Ti/16 (DINOv2's patches are 14 x 14) with random
weights, every parameter, scaled so that activations are of unit scale; and the embedded digits
network, which was trained. Every stage of the Flax twin on each device against the PyTorch twin on
the CPU. Rows of other devices and of families not named stay as they are: run it on a machine with
a GPU or a TPU to add theirs. Writes `results/parity.json` and the table in `docs/parity.md`; where
a row is outside its bound the table says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import RESULTS, ROOT, environment, machine, parse

import vit_torch
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import InputError
from vit_torch.pretrained import to_numpy
from vit_torch.verify import DTYPES, Verification, verify

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SIZES = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "num_labels": 1000}
INNER = {"intermediate_size": 768}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViT", "ForImageClassification", INNER),
    "deit": ("DeiT", "ForImageClassificationWithTeacher", INNER),
    "beit": ("Beit", "ForImageClassification", {**INNER, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2", "ForImageClassification", {}),
    "dinov2_with_registers": ("Dinov2WithRegisters", "ForImageClassification", {}),
}
FAMILIES = (*NETWORKS, "digits")


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random: dense weights by one over the root of their inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim in (2, 4) and not name.endswith("_table"):
                value /= parameter[0].numel() ** 0.5
            elif parameter.ndim == 1:
                value = 0.2 * value + float("norm" in name and name.endswith("weight"))
            parameter.copy_(value)
    return model


def checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of that family."""
    if family == "digits":
        return Path(embedded_checkpoint())
    stem, head, fields = NETWORKS[family]
    config = getattr(vit_torch, f"{stem}Config")(**SIZES, **fields)
    randomize(getattr(vit_torch, stem + head)(config)).save_pretrained(folder)
    return folder


def to_transformers(family: str, path: Path, found: Verification) -> float | None:
    """Largest difference of the PyTorch twin's hidden states and logits to Transformers' model.

    In float64; its attention is "sdpa", since its own takes the softmax in float32.
    """
    if family == "digits":
        stem, head = "ViT", "ForImageClassification"
    else:
        stem, head, _ = NETWORKS[family]
    reference = getattr(transformers, stem + head).from_pretrained(
        path, attn_implementation="sdpa", dtype=torch.float64
    )
    twin = getattr(vit_torch, stem + head).from_pretrained(path, dtype=torch.float64)
    height, width = found.image_size
    x = np.random.default_rng(0).standard_normal((2, twin.config.num_channels, height, width))
    with torch.no_grad():
        ours, theirs = (
            model.eval()(torch.tensor(x), output_hidden_states=True) for model in (twin, reference)
        )
    pairs = [*zip(ours.hidden_states, theirs.hidden_states, strict=True)]
    pairs.append((ours.logits, theirs.logits))
    return max(float(np.abs(to_numpy(a) - to_numpy(b)).max()) for a, b in pairs)


def measure(family: str, device: str, dtypes: list[str]) -> list[dict[str, Any]]:
    """Rows of one family on one device."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(family, Path(folder))
        found = verify(path, devices=(device,), dtypes=dtypes)
        reference = to_transformers(family, path, found)
    for note in found.notes:
        print(f"{family}: {note}", file=sys.stderr)
    rows = []
    for row in found.rows:
        worst = row.worst
        assert worst is not None  # the twins of one checkpoint have the same stages
        command = f"python benchmarks/parity.py --families {family} --devices {device}"
        rows.append(
            {
                "family": family,
                "device": row.device,
                "platform": device,
                "machine": machine(device),
                "dtype": row.dtype,
                "precision": row.precision,
                "stage": worst.stage.name,
                "max_abs": max(checked.stage.max_abs for checked in row.stages),
                "scale": max(checked.stage.scale for checked in row.stages),
                "rule": row.rule,
                "value": worst.value,
                "bound": worst.bound,
                "passed": row.passed,
                "transformers_float64": reference,
                "command": f"{command} --dtypes {row.dtype}",
                "environment": environment(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    kinds: dict[str, set[str | None]] = {}
    for row in rows:
        kinds.setdefault(row["platform"], set()).add(row.get("machine"))
    lines = [
        "| family | device | dtype | precision | max abs error | closest to its bound | value "
        "| bound | to Transformers (torch, float64) | jax, torch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        versions = row["environment"]["versions"]
        times = "" if row["rule"] == "absolute" else " x"
        form = ".1e" if row["rule"] == "absolute" else ".2f"
        mark = "" if row["passed"] else " **outside**"
        several = len(kinds[row["platform"]]) > 1  # machines that measured on this platform
        where = f" ({row.get('machine') or 'unnamed'})" if several else ""
        lines.append(
            f"| {row['family']} | {row['device']}{where} | {row['dtype']} | {row['precision']} "
            f"| {row['max_abs']:.1e} | {row['stage']} | {row['value']:{form}}{times}{mark} "
            f"| {row['bound']:{form}}{times} | {row['transformers_float64']:.1e} "
            f"| {versions.get('jax')}, {versions.get('torch')} |"
        )
    return "\n".join(lines)


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows, those measured again replaced, in the order of families, devices and dtypes."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        kind = row["family"], row["platform"], row["dtype"], row["precision"]
        return *kind, row.get("machine")

    rows = {key(row): row for row in (*old, *new)}
    platforms = ("cpu", "gpu", "tpu")
    return sorted(
        rows.values(),
        key=lambda row: (
            FAMILIES.index(row["family"]),
            platforms.index(row["platform"]),
            DTYPES.index(row["dtype"]),
            row["precision"] != "highest",
            row.get("machine") or "",
        ),
    )


def main() -> None:
    """Measure, write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--devices", nargs="+", choices=("cpu", "gpu", "tpu"), default=["cpu"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parse(parser, families=["digits"], dtypes=["float32"])
    transformers.logging.set_verbosity_error()
    rows = []
    for family in arguments.families:
        for device in arguments.devices:
            try:
                rows += measure(family, device, arguments.dtypes)
            except InputError as error:
                raise SystemExit(str(error)) from error
            print(table(rows[-len(arguments.dtypes) :]).splitlines()[-1], flush=True)
    path = RESULTS / "parity.json"
    old = json.loads(path.read_text()).get("rows", []) if path.exists() else []
    failed = [
        f"{row['family']} {row['device']} {row['dtype']}" for row in rows if not row["passed"]
    ]
    if arguments.quick:
        sys.exit(f"outside bounds: {', '.join(failed)}" if failed else 0)
    rows = merge([row for row in old if "platform" in row], rows)
    text = json.dumps({"question": __doc__.splitlines()[0], "rows": rows}, indent=2) + "\n"
    path.write_text(text)
    page = ROOT / "docs" / "parity.md"
    text = page.read_text()
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{head}{BEGIN}\n{table(rows)}\n{tail}")
    print(table(rows))
    if failed:
        sys.exit(f"outside bounds: {', '.join(failed)}")


if __name__ == "__main__":
    main()
