"""How long does a ViT-B take from the Hub's safetensors to Flax's msgpack, and how much memory?

    python benchmarks/conversion.py [--rounds 5]

The contenders read the same random ViT-B/16 `model.safetensors` (345 MB) and write to the same
disk; each run is a fresh process, and they take turns. Beside `vit convert`, with and without its
verification: a plain copy of the same file with the SHA-256 of its bytes, which is about the least
that any conversion could take, and Transformers 4.57.6, which loads the model with `from_pt=True`
and saves it. The files that the first run wrote are compared, tensor by tensor to the bit, before
anything is counted. `work` is the call itself, without starting Python and importing, and `cpu` the
processor's time in it, which other work on the machine changes less; `process` is everything; the
peak of memory is the process's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import parse, ratio, run_process, spread, write_result

START = """
import json, time
def peak():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) / 1024 for l in status if l.startswith("VmHWM"))
"""
END = """
work, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"work": work, "cpu": cpu, "peak_mb": peak()}))
"""

CONVERT = """
from vit_convert.convert import convert
start, cpu = time.perf_counter(), time.process_time()
convert({source!r}, {target!r}, to="flax", verify={verify}, force=True)
"""
# In pieces of 1 MiB, read back from the copy, as `sha256sum` would after `cp`.
COPY = """
import hashlib, os, shutil
start, cpu = time.perf_counter(), time.process_time()
os.makedirs({target!r}, exist_ok=True)
target = os.path.join({target!r}, "model.safetensors")
shutil.copyfile(os.path.join({source!r}, "model.safetensors"), target)
with open(target, "rb") as file:
    hashlib.file_digest(file, "sha256").hexdigest()
{flush}
"""
# `vit convert` gives the file its name only after its bytes are on the disk.
FLUSH = """
descriptor = os.open(target, os.O_RDONLY)
os.fsync(descriptor)
os.close(descriptor)
"""
TRANSFORMERS = """
from transformers import {cls}
start, cpu = time.perf_counter(), time.process_time()
{cls}.from_pretrained({source!r}, from_pt=True).save_pretrained({target!r})
"""
MAKE = """
from safetensors.numpy import save_file
import numpy as np
from vit_common.parameters import parameter_shapes
from vit_common.presets import preset
from pathlib import Path
config = preset({model!r})
config.architectures = ["ViTModel"]
config.dtype = "float32"
rng = np.random.default_rng(0)
weights = {{
    name: rng.standard_normal(shape, np.float32) * np.float32(0.02)
    for name, shape in parameter_shapes(config, None).items()
}}
save_file(weights, {path!r} + "/model.safetensors", {{"format": "pt"}})
Path({path!r}, "config.json").write_text(config.to_json_string())
"""
# Read with flax's own reader, which is none of the contenders.
COMPARE = """
import json, sys
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
want, *others = (
    flatten_dict(msgpack_restore(open(path + "/flax_model.msgpack", "rb").read()), sep="/")
    for path in {paths!r}
)
for other in others:
    assert set(other) == set(want), sorted(set(other) ^ set(want))
    for name, array in want.items():
        given = other[name]
        assert given.dtype == array.dtype and given.shape == array.shape, name
        assert np.array_equal(given.view(np.uint32), np.asarray(array).view(np.uint32)), name
print(json.dumps({{"tensors": len(want), "bytes": sum(a.nbytes for a in want.values())}}))
"""

OURS, VERIFIED = "vit convert --no-verify", "vit convert"
COPIED, FLUSHED = "copy and SHA-256", "copy, SHA-256 and fsync"
THEIRS = "Transformers FlaxViTModel"


def main() -> None:
    """Run and write `results/conversion-MACHINE.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each contender")
    parser.add_argument("--model", default="base", help="the network's size")
    arguments = parse(parser, rounds=1, model="tiny")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.mkdir()
        run_process([sys.executable, "-c", MAKE.format(path=str(source), model=arguments.model)])
        bodies = {
            OURS: CONVERT.replace("{verify}", "False"),
            COPIED: COPY.replace("{flush}", ""),
            FLUSHED: COPY.replace("{flush}", FLUSH),
            VERIFIED: CONVERT.replace("{verify}", "True"),
            THEIRS: TRANSFORMERS.replace("{cls}", "FlaxViTModel"),
        }
        targets = {name: str(Path(folder, str(i))) for i, name in enumerate(bodies)}
        commands = {
            name: [
                sys.executable,
                "-c",
                START + body.format(source=str(source), target=targets[name]) + END,
            ]
            for name, body in bodies.items()
        }
        # Once uncounted: warms the disk cache, and shows that all write the same weights.
        for command in commands.values():
            run_process(command)
        paths = [targets[THEIRS], targets[OURS], targets[VERIFIED]]
        compared = json.loads(
            run_process([sys.executable, "-c", COMPARE.format(paths=paths)])["stdout"]
        )
        runs: dict[str, list] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                run = run_process(command)
                runs[name].append({"process": run["seconds"], **json.loads(run["stdout"])})

    samples = {
        kind: {name: [run[kind] for run in r] for name, r in runs.items()}
        for kind in ("work", "cpu", "process", "peak_mb")
    }
    ratios = {
        f"{kind}, {ours} / {other}": ratio(samples[kind][other], samples[kind][ours])
        for kind, pairs in {
            "work": [(OURS, COPIED), (OURS, FLUSHED), (VERIFIED, COPIED), (VERIFIED, FLUSHED)],
            "cpu": [(OURS, COPIED), (OURS, FLUSHED), (VERIFIED, COPIED)],
            "process": [(OURS, COPIED), (VERIFIED, COPIED)],
        }.items()
        for ours, other in pairs
    } | {
        f"{kind}, {THEIRS} / {ours}": ratio(samples[kind][ours], samples[kind][THEIRS])
        for kind in ("work", "cpu", "process", "peak_mb")
        for ours in (OURS, VERIFIED)
    }
    result = {
        "question": __doc__.splitlines()[0],
        "rounds": arguments.rounds,
        "equal_to_the_bit": compared,
        **{
            kind: {name: spread(values) for name, values in table.items()}
            for kind, table in samples.items()
        },
        "ratios": ratios,
    }
    if not arguments.quick:
        write_result("conversion", result)
    for name in commands:
        kinds = ("work", "cpu", "process", "peak_mb")
        work, cpu, process, peak = (result[kind][name] for kind in kinds)
        print(
            f"{name:26} work {work['median']:6.2f} s ({work['min']:.2f} to {work['max']:.2f}), "
            f"cpu {cpu['median']:5.2f} s, "
            f"process {process['median']:6.2f} s ({process['min']:.2f} to {process['max']:.2f}), "
            f"{peak['median']:6.0f} MB"
        )
    for name, row in ratios.items():
        print(f"{name:60} {row['median']:5.2f} ({row['min']:.2f} to {row['max']:.2f})")


if __name__ == "__main__":
    main()
