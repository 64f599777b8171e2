"""How long from process start to the first ViT-B/16 prediction, and how much memory?

    python benchmarks/startup.py [--rounds 5]

Contenders read the same random ViT-B/16 `model.safetensors` and classify the same image; each run
is a fresh process, the contenders take turns, and their logits are compared before anything is
timed. Wall time and peak memory are of the whole process. Beside it: what `import vit_flax` costs
over `import jax, flax`, and `vit --help`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import parse, ratio, require_agreement, run_process, spread, write_result

FLAX_TAIL = """
import numpy as np
marks.append(("imports", time.perf_counter()))
model = {cls}.from_pretrained({path!r})
marks.append(("load", time.perf_counter()))
x = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
logits = np.asarray(model(x).logits)
"""
TORCH_TAIL = """
import numpy as np
marks.append(("imports", time.perf_counter()))
model = {cls}.from_pretrained({path!r})
marks.append(("load", time.perf_counter()))
x = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
with torch.no_grad():
    logits = model(torch.from_numpy(x)).logits.numpy()
"""
END = """
marks.append(("compile and run", time.perf_counter()))
times = [t for _, t in marks]
print(json.dumps({"phases": {n: t - s for (n, t), s in zip(marks[1:], times)},
                  "logits": logits[0].tolist()}))
"""
START = 'import json, time, warnings; marks = [("start", time.perf_counter())]\n'

CONTENDERS = {
    "vit_flax": (
        "from vit_flax import FlaxViTForImageClassification\n" + FLAX_TAIL,
        "FlaxViTForImageClassification",
    ),
    "Transformers FlaxViT": (
        "from transformers import FlaxViTForImageClassification\n" + FLAX_TAIL,
        "FlaxViTForImageClassification",
    ),
    "vit_torch": (
        "import torch\nfrom vit_torch import ViTForImageClassification\n" + TORCH_TAIL,
        "ViTForImageClassification",
    ),
    "Transformers torch": (
        "import torch\nfrom transformers import ViTForImageClassification\n" + TORCH_TAIL,
        "ViTForImageClassification",
    ),
}
IMPORTS = {
    "import jax, flax": [sys.executable, "-c", "import jax, flax"],
    "import vit_flax": [sys.executable, "-c", "from vit_flax import *"],
    "vit --help": [str(Path(sys.executable).with_name("vit")), "--help"],
}
MAKE = """
import torch
from vit_common.presets import preset
from vit_torch import ViTForImageClassification
torch.manual_seed(0)
ViTForImageClassification(preset({model!r}, num_labels=1000)).save_pretrained({path!r})
"""


def main() -> None:
    """Run and write `results/startup-MACHINE.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each contender")
    parser.add_argument("--model", default="base", help="the network's size")
    arguments = parse(parser, rounds=1, model="tiny")
    with tempfile.TemporaryDirectory() as path:
        run_process([sys.executable, "-c", MAKE.format(path=path, model=arguments.model)])
        commands = {
            name: [sys.executable, "-c", START + body.format(cls=cls, path=path) + END]
            for name, (body, cls) in CONTENDERS.items()
        }
        # Once uncounted: warms the disk cache, and shows that all give the same answer.
        first = {name: json.loads(run_process(c)["stdout"]) for name, c in commands.items()}
        want = np.array(first["Transformers torch"]["logits"])
        differences = {
            n: float(np.abs(np.array(r["logits"]) - want).max()) for n, r in first.items()
        }
        require_agreement(differences, 1e-4)
        runs: dict[str, list] = {name: [] for name in [*commands, *IMPORTS]}
        for _ in range(arguments.rounds):
            for name, command in {**commands, **IMPORTS}.items():
                runs[name].append(run_process(command))

    seconds = {name: [run["seconds"] for run in r] for name, r in runs.items()}
    memory = {name: [run["peak_mb"] for run in r] for name, r in runs.items()}
    phases = {
        name: {
            phase: spread([json.loads(run["stdout"])["phases"][phase] for run in runs[name]])
            for phase in ("imports", "load", "compile and run")
        }
        for name in commands
    }
    ours = "vit_flax"
    result = {
        "question": __doc__.splitlines()[0],
        "rounds": arguments.rounds,
        "largest_difference_to_transformers_torch": differences,
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "peak_mb": {name: spread(memory[name]) for name in commands},
        "phases": phases,
        "ratios": {
            f"seconds, {name} / {ours}": ratio(seconds[ours], seconds[name])
            for name in commands
            if name != ours
        }
        | {
            f"peak memory, {name} / {ours}": ratio(memory[ours], memory[name])
            for name in commands
            if name != ours
        }
        | {
            "import vit_flax / import jax, flax": ratio(
                seconds["import jax, flax"], seconds["import vit_flax"]
            )
        },
    }
    if not arguments.quick:
        write_result("startup", result)
    for name in [*commands, *IMPORTS]:
        row = result["seconds"][name]
        peak = f"{result['peak_mb'][name]['median']:6.0f} MB" if name in commands else ""
        print(f"{name:24} {row['median']:6.2f} s ({row['min']:.2f} to {row['max']:.2f}) {peak}")
    for name, row in result["ratios"].items():
        print(f"{name:55} {row['median']:5.2f} ({row['min']:.2f} to {row['max']:.2f})")


if __name__ == "__main__":
    main()
