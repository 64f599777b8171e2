"""Which of timm's Vision Transformers does the package read, and does it compute the same?

    python benchmarks/coverage.py [PATTERN ...] [--again] [--page docs/coverage.md]

Every network that `timm.list_models` has under `vit*`, `deit*`, `beit*`, `flexivit*`, `eva*`,
`naflexvit*` and `samvit*` is built by timm itself with two blocks, a narrow width where its heads
allow one, and a small image that is not square where its class allows one; every parameter is
random, none zero or one. `timm.models.save_for_hf` writes it as it would for the Hub: weights and
timm's `config.json`. Both twins load that folder with their Auto classes, and their outputs are
compared with timm's:

- `equal`: both within 2e-5 of timm's, relative to the largest, in float32;
- `refused`: with an error of this package, whose message is kept;
- `wrong`: the outputs differ;
- `crash`: anything else.

Results are kept as they come. What is equal is not run again unless `--again` says so; patterns
(as the shell's) choose some of the networks. Networks without a classifier are compared by the
class token or the pooled output that timm returns for them: they are given a head of 7 classes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import RESULTS, environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = RESULTS / "coverage.json"
PATTERNS = ("vit*", "deit*", "beit*", "flexivit*", "eva*", "naflexvit*", "samvit*")
BOUND = 2e-5
CLASSES = 7
DEPTH = 2

# First match wins. (pattern of the name, kind, what is particular to it)
KINDS = (
    ("samvit_*", "SAM's encoder"),
    ("naflexvit_*radio*", "RADIO, NaFlex"),
    ("naflexvit_*", "NaFlex"),
    ("vitamin_*", "ViTamin"),
    ("vit_*sapiens2", "Sapiens 2"),
    ("vit_*dinov3*", "DINOv3"),
    ("vit_*lingbot", "LingBot"),
    ("vit_pe_*", "Perception Encoder"),
    ("eva02_*clip*", "EVA-02 CLIP"),
    ("eva02_*", "EVA-02"),
    ("eva_giant_*", "EVA"),
    ("eva_large_*", "EVA"),
    ("beit3_*", "BEiT-3"),
    ("beit*", "BEiT"),
    ("deit3_*", "DeiT-III"),
    ("deit*", "DeiT"),
    ("flexivit_*", "FlexiViT"),
    ("vit_*clip*", "CLIP"),
    ("vit_*siglip_gap*", "SigLIP without its pooling"),
    ("vit_*siglip*", "SigLIP"),
    ("vit_*tipsv2", "TIPS v2"),
    ("vit_*dinov2", "DINOv2"),
    ("vit_*radio*", "RADIO"),
    ("vit_intern300m*", "InternViT"),
    ("vit_srelpos_*", "relative positions"),
    ("vit_relpos_*", "relative positions"),
    ("vit_*rope*", "rotary positions (ViT)"),
    ("vit_*_xp_*", "parallel blocks"),
    ("vit_*pwee_*", "parallel blocks"),
    ("vit_*18x2*", "parallel branches"),
    ("vit_d[wl]*", "differential attention"),
    ("vit_*rpn*", "norms after the branches"),
    ("vit_*_r50_*", "hybrid"),
    ("vit_*_r26_*", "hybrid"),
    ("vit_*_r_*", "hybrid"),
    ("vit_*resnet*", "hybrid"),
    ("vit_*mci*", "hybrid"),
    ("vit_*gap*", "ViT with average pooling, registers"),
    ("vit_*map*", "ViT with average pooling, registers"),
    ("*", "ViT"),
)


def kind_of(name: str) -> str:
    return next(kind for pattern, kind in KINDS if fnmatch.fnmatchcase(name, pattern))


def import_timm() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    from timm_models import timm

    return timm


def names_of(timm: Any) -> list[str]:
    found = [name for pattern in PATTERNS for name in timm.list_models(pattern)]
    return list(dict.fromkeys(found))


# -- one network


def randomise(model: Any) -> Any:
    """Every parameter and statistic at random, none zero or one, and activations of unit scale."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    state = {**dict(model.named_parameters()), **dict(model.state_dict())}
    with torch.no_grad():
        for name, tensor in state.items():
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            value = rng.normal(size=tuple(tensor.shape))
            if name.endswith("running_var"):
                value = 0.5 + np.abs(value)
            elif name.endswith("rope.freqs"):
                value = tensor.detach().double().numpy() * (1 + 0.1 * value)
            elif "gamma" in name or ".ls" in name:
                value = 0.7 + 0.2 * value
            elif value.ndim == 1 and name.endswith("weight"):
                value = 1.0 + 0.2 * value
            elif value.ndim == 1:
                value *= 0.2
            elif value.ndim in (2, 4) and name.endswith("weight"):
                value /= np.sqrt(np.prod(value.shape[1:]))
            elif value.ndim == 1:
                value *= 0.2
            tensor.copy_(torch.tensor(value))
    return model.eval()


def build(timm: Any, name: str) -> Any:
    """timm's network with two blocks, as narrow and small as its class takes it."""
    from timm_table import arguments_of

    kind, known = arguments_of(name)
    heads, patch = known.get("num_heads", 12), known.get("patch_size", 16)
    given: dict[str, Any] = {"depth": DEPTH, "num_classes": CLASSES}
    if kind == "VisionTransformerSAM":
        given["global_attn_indexes"] = (1,)
    if kind == "NaFlexVit":
        factorized = known.get("pos_embed") == "factorized"
        given["pos_embed_grid_size"] = (4, 4) if factorized else (4, 5)
    per_block = known.get("num_kv_heads")
    if isinstance(per_block, (tuple, list)):  # both kinds of blocks, where there are two
        given["num_kv_heads"] = (per_block[0], per_block[len(per_block) // 2])
    narrow = {"embed_dim": 16 * heads}
    if known.get("rel_pos_dim"):
        narrow["rel_pos_dim"] = 48
    stem = "embed_layer" in known
    unit = (16 if name.startswith("vitamin") else 32) if stem else patch
    sizes = [(4 * unit, 5 * unit), 4 * unit, None]
    if kind == "VisionTransformerSAM":
        sizes = [20 * unit, *sizes]
    faults = []
    for size in sizes:
        for less in (narrow, {}):
            more = {} if size is None else {"img_size": size}
            try:
                model = randomise(timm.create_model(name, **given, **less, **more))
                model(pixels(model, name))
                return model
            except (TypeError, ValueError, AssertionError, RuntimeError) as error:
                faults.append(f"{more} {less}: {error}")
    raise RuntimeError("; ".join(faults))


def pixels(model: Any, name: str) -> Any:
    import numpy as np
    import torch

    if hasattr(model, "embeds"):  # NaFlex: positions keep the axes of their grid
        positions = model.embeds.pos_embed
        grid = (4, 4) if positions is None else positions.shape[1:3]
        size = [count * side for count, side in zip(grid, model.embeds.patch_size, strict=True)]
    else:
        size = model.patch_embed.img_size
    x = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    return torch.tensor(x)


def try_network(timm: Any, name: str, folder: Path) -> dict[str, Any]:
    """What becomes of one network: outcome, largest relative differences, reason."""
    import numpy as np
    import torch

    import vit_flax
    import vit_torch
    from vit_common.errors import ViTError

    model = build(timm, name)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    x = pixels(model, name)
    with torch.no_grad():
        want = model(x).numpy()
    del model
    scale = max(1.0, float(np.abs(want).max()))
    row: dict[str, Any] = {"outcome": "equal"}
    done: dict[str, float] = {}
    for twin in ("torch", "flax"):
        try:
            if twin == "torch":
                ours = vit_torch.AutoModelForImageClassification.from_pretrained(folder).eval()
                with torch.no_grad():
                    got = ours(x).logits.numpy()
            else:
                ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
                    folder, precision="highest"
                )
                got = np.asarray(ours(x.numpy()).logits)
        except ViTError as error:
            message = str(error).replace(str(folder), "DIR").removeprefix("DIR/")
            row.update(outcome="refused", reason=message)
            break
        except Exception as error:
            row.update(outcome="crash", reason=f"{twin}: {type(error).__name__}: {error}"[:1000])
            break
        del ours
        difference = float(np.abs(got - want).max()) / scale if got.shape == want.shape else None
        done[twin] = difference if difference is None else float(f"{difference:.2g}")
        if difference is None or not difference <= BOUND:
            row.update(outcome="wrong", reason=f"{twin} differs by {difference} of {scale:.3g}")
    return {**row, "differences": done} if done else row


def work(names: list[str]) -> None:
    """In a process of its own: one line of JSON for each network."""
    import logging

    import jax
    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    timm = import_timm()
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = try_network(timm, name, Path(folder))
            except Exception as error:
                row = {"outcome": "not built", "reason": f"{type(error).__name__}: {error}"[:2000]}
        row["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({"name": name, **row}), flush=True)
        jax.clear_caches()


# -- all of them


def run_all(names: list[str], known: dict[str, Any], batch: int, save: Any) -> None:
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Compiling takes longer than running these small networks.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    left = list(names)
    while left:
        now, left = left[:batch], left[batch:]
        process = subprocess.Popen(
            [sys.executable, __file__, "--work", *now],
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
        )
        assert process.stdout is not None
        done = []
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            name = row.pop("name")
            known[name] = row
            done.append(name)
            print(f"{row['outcome']:8} {row['seconds']:5} s  {name}", file=sys.stderr)
            save()
        if process.wait():
            ended = next((name for name in now if name not in done), None)
            if ended is not None:
                reason = f"the process ended with {process.returncode}"
                known[ended] = {"outcome": "crash", "reason": reason}
                left = [n for n in now if n not in done and n != ended] + left
                save()


def counts_of(rows: dict[str, Any]) -> dict[str, int]:
    found = Counter(row["outcome"] for row in rows.values())
    return {name: found[name] for name in ("equal", "refused", "wrong", "crash", "not built")}


def page(result: dict[str, Any]) -> str:
    """The tables of `docs/coverage.md`."""
    rows = result["networks"]
    kinds: dict[str, list[str]] = {}
    for name in rows:
        kinds.setdefault(kind_of(name), []).append(name)
    lines = [
        f"| kind | networks of timm {result['timm']} | equal | refused | wrong |",
        "|---|---|---|---|---|",
    ]
    for kind, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        count = Counter(rows[name]["outcome"] for name in names)
        bad = count["wrong"] + count["crash"] + count["not built"]
        lines.append(f"| {kind} | {len(names)} | {count['equal']} | {count['refused']} | {bad} |")
    total = result["counts"]
    bad = total["wrong"] + total["crash"] + total["not built"]
    lines.append(f"| all | {len(rows)} | {total['equal']} | {total['refused']} | {bad} |")
    own = [row for name, row in rows.items() if name.startswith(("vit", "samvit"))]
    equal = sum(row["outcome"] == "equal" for row in own)
    lines += ["", f"Of the {len(own)} names under `vit*` and `samvit*`, {equal} are equal."]
    environ = result["environment"]
    versions = environ["versions"]
    lines += [
        "",
        f"Measured {environ['date']} on {environ['processor']}, with jax {versions['jax']}, flax "
        f"{versions['flax']}, torch {versions['torch']} and timm {result['timm']}.",
    ]
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["outcome"] == "refused":
            reasons.setdefault(row["reason"].replace(name, "NAME"), []).append(name)
    if reasons:
        lines += ["", "| refused | the message |", "|---|---|"]
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            shown = " ".join(f"`{name}`" for name in names)
            text = reason.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {shown} | {text[:400]} |")
    return "\n".join(lines) + "\n"


_BEGIN, _END = "<!-- coverage: begin -->\n", "<!-- coverage: end -->\n"


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Put the tables between the two marks of a page."""
    text = path.read_text()
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    path.write_text(before + _BEGIN + page(result) + _END + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names of networks")
    parser.add_argument("--again", action="store_true", help="run those that were equal too")
    parser.add_argument("--batch", type=int, default=24, help="networks in one process")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the results")
    parser.add_argument("--page", type=Path, help="page whose tables are written anew")
    parser.add_argument("--quick", action="store_true", help="one network; writes nothing")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.patterns)
    timm = import_timm()
    everything = names_of(timm)
    known: dict[str, Any] = {}
    if options.result.exists() and not options.quick:
        known = json.loads(options.result.read_text())["networks"]
    patterns = ["vit_tiny_patch16_224"] if options.quick else options.patterns or ["*"]
    chosen = [n for n in everything if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not options.again:
        chosen = [n for n in chosen if known.get(n, {}).get("outcome") != "equal"]

    def collect() -> dict[str, Any]:
        rows = {name: known[name] for name in everything if name in known}
        return {
            "environment": environment(),
            "timm": timm.__version__,
            "bound": BOUND,
            "depth": DEPTH,
            "counts": {"networks": len(rows), **counts_of(rows)},
            "networks": rows,
        }

    def save() -> None:
        if not options.quick:
            options.result.parent.mkdir(parents=True, exist_ok=True)
            options.result.write_text(json.dumps(collect(), indent=1) + "\n")

    run_all(chosen, known, options.batch, save)
    save()
    result = collect()
    print(json.dumps(result["counts"]))
    if options.page is not None:
        write_page(options.page, result)
    if options.quick and result["counts"]["equal"] != 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
