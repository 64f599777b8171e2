"""What does a scan over the layers save in compiling, and what does it cost; what does each remat
policy keep?

    python benchmarks/scan.py [--parts tpu cpu speed memory] [--rounds 3] [--models base large]

`tpu` and `memory` compile with XLA's TPU compiler, which needs no TPU, but
`pip install '.[tpu-check]'`; `cpu` compiles for this processor; both need no weights. Each
program is made in a process of its own, scanned and not in turn. A machine that does other things
too shows in the seconds by the clock; those of the processor, over all cores, are the fairer
figure. `speed` runs ViT-B on the CPU, after comparing what both give.

The compiler's own count of operations and bytes takes the body of a loop once, whatever the number
of rounds: of a scanned network only its memory is reported. Writes `results/scan-MACHINE.json`;
parts that are not run stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from typing import Any

from common import RESULTS, environment, machine, parse, ratio, run_process, spread, write_result

CHIP = "v5e"
TPU_BATCH, CPU_BATCH, SPEED_BATCHES = 64, 8, (1, 8)
MEMORY_BATCH, MEMORY_LAYERS = 64, 4
MODELS = ("base", "large")
PARTS = ("tpu", "cpu", "speed", "memory")
NO_REMAT = "no gradient checkpointing"
POLICIES = (
    NO_REMAT,
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)


def model_of(config: Any, scanned: bool, dtype: str) -> Any:
    """A classifier without parameters."""
    from vit_flax import FlaxViTForImageClassification

    return FlaxViTForImageClassification(config, dtype=dtype, _do_init=False, scan_layers=scanned)


def pixels_of(config: Any, batch: int, dtype: str) -> Any:
    """Shape and dtype of the images."""
    import jax

    shape = (batch, config.num_channels, *config.image_height_width)
    return jax.ShapeDtypeStruct(shape, dtype)


def on_chip() -> Any:
    """Arguments of `jax.jit` that put a program on one chip."""
    from vit_flax.sharding import replicated
    from vit_flax.tpu_check import chip_mesh

    place = replicated(chip_mesh(CHIP, devices=1))
    return {"in_shardings": place, "out_shardings": place}


def stages(jitted: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The compiled program, and seconds of tracing, lowering and compiling, each by the clock and
    of the processor."""
    seconds = {}
    done = jitted
    for name in ("trace", "lower", "compile"):
        start = time.perf_counter(), time.process_time()
        done = getattr(done, name)(*arguments)
        arguments = ()
        seconds[name] = {
            "clock": round(time.perf_counter() - start[0], 2),
            "processor": round(time.process_time() - start[1], 2),
        }
    return done, seconds


def compile_one(platform: str, size: str, scanned: bool) -> dict[str, Any]:
    """Compile a forward pass."""
    import jax

    from vit_common.presets import preset
    from vit_flax.attention import compiled_for
    from vit_flax.tpu_check import libtpu_environment

    config = preset(size, num_labels=1000)
    batch, dtype = (TPU_BATCH, "bfloat16") if platform == "tpu" else (CPU_BATCH, "float32")
    model = model_of(config, scanned, dtype)

    def forward(params, pixel_values):
        return model(pixel_values, params=params).logits

    with libtpu_environment(), compiled_for(platform):
        jitted = jax.jit(forward, **(on_chip() if platform == "tpu" else {}))
        arguments = model.params_shape_tree, pixels_of(config, batch, dtype)
        compiled, seconds = stages(jitted, *arguments)
    memory = compiled.memory_analysis()
    return {
        "batch": batch,
        "dtype": dtype,
        "seconds": seconds,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def memory_one(policy: str, scanned: bool) -> dict[str, Any]:
    """Compile a training step."""
    import jax
    import optax

    from vit_common.presets import preset
    from vit_flax.attention import compiled_for
    from vit_flax.tpu_check import libtpu_environment
    from vit_flax.training import TrainState, cross_entropy, make_step

    config = preset("large", num_labels=1000, num_hidden_layers=MEMORY_LAYERS)
    model = model_of(config, scanned, "bfloat16")
    if policy != NO_REMAT:
        model.enable_gradient_checkpointing(policy)

    # Plain gradient descent keeps nothing between steps: what is measured are the activations.
    optimizer = optax.sgd(0.1)
    step = make_step(model, cross_entropy(), optimizer)
    state = jax.eval_shape(
        lambda params: TrainState.create(model, optimizer, params=params), model.params_shape_tree
    )
    with libtpu_environment(), compiled_for("tpu"):
        place = on_chip()["in_shardings"]
        batch = {
            "pixel_values": pixels_of(config, MEMORY_BATCH, "bfloat16"),
            "labels": jax.ShapeDtypeStruct((MEMORY_BATCH,), "int32"),
        }
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            (state, batch),
        )
        compiled, seconds = stages(step, *arguments)
    memory = compiled.memory_analysis()
    return {"temporary_bytes": memory.temp_size_in_bytes, "seconds": seconds}


def speed(model: str, rounds: int) -> list[dict[str, Any]]:
    """A network on the CPU, both ways in turn, in one process."""
    import jax
    import numpy as np

    from vit_common.presets import preset
    from vit_flax import stack_layers

    config = preset(model, num_labels=1000)
    models = {scanned: model_of(config, scanned, "float32") for scanned in (False, True)}
    params = {False: models[False].init_weights(jax.random.key(0))}
    params[True] = stack_layers(params[False])
    rows = []
    for batch in SPEED_BATCHES:
        rng = np.random.default_rng(0)
        x = jax.numpy.asarray(rng.normal(size=(batch, 3, 224, 224)), "float32")

        def run(scanned: bool, x: Any = x) -> Any:
            return jax.block_until_ready(models[scanned](x, params=params[scanned]).logits)

        difference = float(abs(run(True) - run(False)).max())
        assert difference < 1e-4, f"scanned and not differ by {difference}"
        samples: dict[str, dict[bool, list[float]]] = {
            "clock": {False: [], True: []},
            "processor": {False: [], True: []},
        }
        for _ in range(rounds):
            for scanned in (False, True):
                start = time.perf_counter(), time.process_time()
                run(scanned)
                samples["clock"][scanned].append(time.perf_counter() - start[0])
                samples["processor"][scanned].append(time.process_time() - start[1])
        row: dict[str, Any] = {"model": model, "batch": batch, "difference": difference}
        for kind, found in samples.items():
            row[kind] = {
                "unscanned": spread(found[False]),
                "scanned": spread(found[True]),
                "scanned_to_unscanned": ratio(found[False], found[True]),
            }
        rows.append(row)
    return rows


def child(*job: str) -> dict[str, Any]:
    """One program, made in a process of its own."""
    done = run_process([sys.executable, os.path.abspath(__file__), "--one", *job])
    row = json.loads(done["stdout"].splitlines()[-1])
    row["peak_mb"] = round(done["peak_mb"])
    print(*job, json.dumps(row), file=sys.stderr, flush=True)
    return row


def compiling(platform: str, models: list[str], rounds: int) -> list[dict[str, Any]]:
    """Both ways of each model, in turn."""
    rows = []
    for size in models:
        found: dict[str, list[dict[str, Any]]] = {"unscanned": [], "scanned": []}
        for _ in range(rounds):
            for name, samples in found.items():
                samples.append(child("compile", platform, size, name))
        row: dict[str, Any] = {"model": size, "unscanned": {}, "scanned": {}}
        for name, samples in found.items():
            row |= {key: samples[0][key] for key in ("batch", "dtype")}
            for key in ("temporary_bytes", "code_bytes"):
                row[name][key] = samples[0][key]
            row[name]["peak_mb"] = spread([sample["peak_mb"] for sample in samples])
            row[name]["stages"] = [sample["seconds"] for sample in samples]
        for kind in ("clock", "processor"):
            total = {
                name: [sum(stage[kind] for stage in s["seconds"].values()) for s in samples]
                for name, samples in found.items()
            }
            row[kind] = {name: spread(values) for name, values in total.items()}
            row[kind]["scanned_to_unscanned"] = ratio(total["unscanned"], total["scanned"])
        rows.append(row)
    return rows


def main() -> None:
    """Run and write `results/scan-MACHINE.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parse(
        parser, models=["tiny"], rounds=1, policies=["nothing_saveable"], parts=quick_parts()
    )
    if options.one:
        kind, *job = options.one
        job, scanned = job[:-1], job[-1] == "scanned"
        make: Any = compile_one if kind == "compile" else memory_one
        print(json.dumps(make(*job, scanned)))
        return
    rows: list[dict[str, Any]]
    for part in options.parts:
        if part == "speed":
            rounds = options.rounds if options.quick else max(options.rounds, 10)
            write(part, speed("tiny" if options.quick else "base", rounds), options.quick)
        elif part == "memory":
            rows = []
            for policy in options.policies:
                row = {
                    "model": f"large, {MEMORY_LAYERS} layers",
                    "batch": MEMORY_BATCH,
                    "policy": policy,
                }
                for name in ("unscanned", "scanned"):
                    row[name] = child("memory", policy, name)
                write(part, rows := [*rows, row], options.quick)
        else:
            rows = []
            for size in options.models:
                rows += compiling(part, [size], options.rounds)
                write(part, rows, options.quick)


def quick_parts() -> list[str]:
    """What runs without XLA's TPU compiler, and with it if it is here."""
    with_compiler = importlib.util.find_spec("libtpu") is not None
    return [*PARTS] if with_compiler else ["cpu", "speed"]


def write(part: str, rows: list[dict[str, Any]], quick: bool) -> None:
    """Put one part into this machine's `results/scan-MACHINE.json`; the others stay."""
    if quick:
        return
    path = RESULTS / f"scan-{machine()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known = {name: value for name, value in known.items() if name in PARTS}
    # Parts are run in different environments: each has its own.
    known[part] = {"environment": environment(), "rows": rows}
    write_result("scan", {"question": " ".join(__doc__.split("\n\n")[0].split()), **known})


if __name__ == "__main__":
    main()
