"""How many images a second does ViT-B/16 classify, beside its peers and beside matrix products?

    python benchmarks/inference.py [--model base] [--batches 1 8 32 64] [--dtype float32]
        [--device cpu|gpu] [--rounds 5] [--seconds 0] [--only NAME ...] [--python "NAME=PATH" ...]

Every contender is a process of its own that holds the same random weights; they take turns, one
forward pass each a round, and their probabilities are compared before anything is timed. "matrix
products" does as many operations as the network, in products as wide as its MLP, and is what the
device can do. `--python` gives a contender another environment, such as one with Transformers 5:
`--python "Transformers torch, sdpa=/path/to/python"`. Writes `results/inference-MODEL-DTYPE-
DEVICE-MACHINE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, parse, ratio, require_agreement, run_process, spread, write_result
from contender import KINDS

OURS, LIMIT = "vit_flax", "matrix products"
BOUNDS = {"float32": 2e-6, "bfloat16": 2e-3, "float16": 3e-4}  # of a probability; 1/1000 each
MAKE = """
import importlib, numpy as np, torch
from vit_common.presets import preset
from vit_torch import ViTForImageClassification
torch.manual_seed(0)
config = preset({model!r}, num_labels=1000, layer_norm_eps=1e-6)
ViTForImageClassification(config).save_pretrained({path!r})
from vit_convert import convert
convert({path!r}, {path!r} + "/timm.safetensors", to="timm", verify=False)
"""


class Contender:
    """A process that runs one network."""

    def __init__(
        self,
        name: str,
        python: str,
        arguments: Sequence[str],
        *,
        script: str = "contender.py",
        device: str = "cpu",
    ) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                **({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {}),
            },
        )
        self.name = name
        self.versions = self._answer()

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self._errors.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Run, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--dtype", choices=BOUNDS, default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="more rounds, until vit_flax has run so long"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH")
    peers = ["Transformers FlaxViT", "Transformers torch, sdpa"]
    arguments = parse(parser, model="tiny", batches=[1, 2], rounds=1, only=peers)
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    with tempfile.TemporaryDirectory() as path:
        make = MAKE.format(model=arguments.model, path=path)
        run_process(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{make}"]
        )
        contenders = []
        left_out = {}
        for name in dict.fromkeys([OURS, LIMIT, *arguments.only]):
            python = pythons.get(name, sys.executable)
            try:
                options = [path, arguments.device, arguments.dtype]
                contenders.append(Contender(name, python, options, device=arguments.device))
                contenders[-1].ask("1")
            except RuntimeError as error:
                left_out[name] = str(error).strip().splitlines()[-1]
                contenders = [c for c in contenders if c.name != name]
                print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
        if OURS in left_out:
            sys.exit(f"there is nothing to compare with: {OURS} failed: {left_out[OURS]}")
        answers = {
            c.name: np.array(c.ask("probabilities 4")) for c in contenders if c.name != LIMIT
        }
        differences = {n: float(np.abs(a - answers[OURS]).max()) for n, a in answers.items()}
        require_agreement(differences, BOUNDS[arguments.dtype])
        rows = {}
        for batch in arguments.batches:
            seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
            for contender in contenders:
                contender.ask(str(batch))
            ours = seconds[OURS]
            while len(ours) < arguments.rounds or sum(ours) < arguments.seconds:
                for contender in contenders:
                    seconds[contender.name].append(contender.ask(str(batch)))
            rows[batch] = seconds
            report(batch, seconds)
        for contender in contenders:
            contender.close()
    result = {
        "question": __doc__.splitlines()[0],
        "model": arguments.model,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "rounds": {batch: len(seconds[OURS]) for batch, seconds in rows.items()},
        "contenders": {c.name: c.versions for c in contenders},
        "left_out": left_out,
        "largest_difference_of_a_probability": differences,
        "images_per_second": {
            batch: {n: spread([batch / s for s in samples]) for n, samples in seconds.items()}
            for batch, seconds in rows.items()
        },
        "ratios": {
            batch: {
                f"{OURS} / {name}": ratio(seconds[OURS], samples)
                for name, samples in seconds.items()
                if name != OURS
            }
            for batch, seconds in rows.items()
        },
    }
    if not arguments.quick:
        name = f"inference-{arguments.model}-{arguments.dtype}-{arguments.device}"
        write_result(name, result)


def report(batch: int, seconds: dict[str, list[float]]) -> None:
    """Print one batch's rows."""
    print(f"batch {batch}")
    for name, samples in seconds.items():
        rates = spread([batch / s for s in samples])
        ours = ratio(seconds[OURS], samples)["median"]
        print(
            f"  {name:30} {rates['median']:8.3g} images/s ({rates['min']:.3g} to "
            f"{rates['max']:.3g})  vit_flax / it {ours:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
