"""How many images a second does ViT-B/16 classify, beside its peers and beside matrix products?

    python benchmarks/inference.py [--model base] [--batches 1 8 32 64]
        [--dtypes float32 bfloat16 int8] [--device cpu|gpu] [--rounds 5] [--seconds 0]
        [--patience 20] [--only NAME ...] [--python "NAME=PATH" ...]

Every contender is a process of its own that holds the same random weights, in one dtype. Their
probabilities are compared before anything is timed; then they take turns, one forward pass each a
round, in an order drawn anew. "matrix products" does as many operations as the network, in products
as wide as its MLP, and is what the device can do. A contender that is not installed, or whose pass
would take longer than `--patience` seconds, is left out and named. `--python` gives a contender
another environment, such as one with Transformers 5 or OpenVINO: `--python
"OpenVINO=/path/to/python"`. Writes `results/inference-MODEL-DEVICE-MACHINE.json`, MACHINE being the
processor, its widest instructions and the number of its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, parse, ratio, require_agreement, run_process, spread, write_result
from contender import DTYPES, KINDS

OURS, LIMIT = "vit_flax", "matrix products"
PAUSE = 0.3  # seconds between two contenders
# Of a probability, each of which is near 1/1000.
BOUNDS = {"float32": 2e-6, "bfloat16": 2e-3, "float16": 3e-4, "int8": 2e-3}
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


def turns(contenders: Sequence[Contender]) -> Iterator[Contender]:
    """A round: all of them, in an order drawn anew, and not before the threads of the one before
    rest, which wait busily for a while (torch's, ONNX Runtime's)."""
    for contender in random.sample(contenders, len(contenders)):
        time.sleep(PAUSE)
        yield contender


def label(name: str, dtype: str) -> str:
    """A row's name; that of float32 is the contender's own."""
    return name if dtype == "float32" else f"{name}, {dtype}"


def main() -> None:
    """Run, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument(
        "--dtypes", nargs="+", choices=BOUNDS, default=["float32", "bfloat16", "int8"]
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="more rounds, until vit_flax has run so long"
    )
    parser.add_argument(
        "--patience", type=float, default=20.0, help="leave out what would take longer for a pass"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--name", help="of the results, instead of inference-MODEL-DEVICE")
    peers = ["Transformers FlaxViT", "Transformers torch, sdpa"]
    arguments = parse(parser, model="tiny", batches=[1, 2], rounds=1, only=peers)
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    with tempfile.TemporaryDirectory() as path:
        make = MAKE.format(model=arguments.model, path=path)
        run_process(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{make}"]
        )
        contenders: list[Contender] = []
        left_out: dict[str, str] = {}
        dtypes = {}
        for name in dict.fromkeys([OURS, LIMIT, *arguments.only]):
            for dtype in arguments.dtypes:
                if dtype not in DTYPES.get(name, DTYPES[""]) or name in left_out:
                    continue  # what does not start in float32 is not there at all
                options = [path, arguments.device, dtype]
                python = pythons.get(name, sys.executable)
                try:
                    contender = Contender(name, python, options, device=arguments.device)
                    contender.ask("1")
                except RuntimeError as error:
                    left_out[label(name, dtype)] = str(error).strip().splitlines()[-1]
                    print(f"left out: {label(name, dtype)}: {error}", file=sys.stderr)
                    continue
                contender.name = label(name, dtype)
                dtypes[contender.name] = dtype
                contenders.append(contender)
        ours_first = next((c.name for c in contenders if c.name.split(", ")[0] == OURS), None)
        if ours_first is None:
            failed = next(iter(left_out.values()))
            sys.exit(f"there is nothing to compare with: {OURS} failed: {failed}")
        answers = {
            c.name: np.array(c.ask("probabilities 4"))
            for c in contenders
            if not c.name.startswith(LIMIT)
        }
        differences = {n: float(np.abs(a - answers[ours_first]).max()) for n, a in answers.items()}
        for dtype in arguments.dtypes:
            found = {name: d for name, d in differences.items() if dtypes[name] == dtype}
            require_agreement(found, BOUNDS[dtype])
        rows = {}
        last: dict[str, float] = {}  # seconds of an image
        for batch in arguments.batches:
            seconds: dict[str, list[float]] = {}
            for contender in contenders:
                expected = last.get(contender.name, 0.0) * batch
                if expected > arguments.patience:
                    what = f"{contender.name}, batch {batch}"
                    left_out[what] = f"a pass would take {expected:.0f} s"
                    print(f"left out: {what}: {left_out[what]}", file=sys.stderr)
                    continue
                contender.ask(str(batch))
                seconds[contender.name] = []
            ours = seconds.get(ours_first, [])
            while seconds and (len(ours) < arguments.rounds or sum(ours) < arguments.seconds):
                for contender in turns(contenders):
                    if contender.name in seconds:
                        seconds[contender.name].append(contender.ask(str(batch)))
                if ours_first not in seconds:
                    break
            rows[batch] = seconds
            last |= {name: spread(samples)["median"] / batch for name, samples in seconds.items()}
            report(batch, seconds)
        for contender in contenders:
            contender.close()
    result = {
        "question": __doc__.splitlines()[0],
        "model": arguments.model,
        "dtypes": dtypes,
        "device": arguments.device,
        "order": f"drawn anew each round, {PAUSE} s between two contenders",
        "rounds": {
            batch: max(map(len, found.values()), default=0) for batch, found in rows.items()
        },
        "contenders": {c.name: c.versions for c in contenders},
        "left_out": left_out,
        "largest_difference_of_a_probability": differences,
        "images_per_second": {
            batch: {n: spread([batch / s for s in samples]) for n, samples in found.items()}
            for batch, found in rows.items()
        },
        "ratios": {
            batch: {
                f"{ours} / {name}": ratio(found[ours], samples)
                for ours in found
                if ours.split(", ")[0] == OURS
                for name, samples in found.items()
                if name != ours
            }
            for batch, found in rows.items()
        },
    }
    if not arguments.quick:
        name = arguments.name or f"inference-{arguments.model}-{arguments.device}"
        write_result(name, result)


def report(batch: int, seconds: dict[str, list[float]]) -> None:
    """Print one batch's rows; how much faster vit_flax is in each of its dtypes."""
    print(f"batch {batch}")
    ours = [name for name in seconds if name.split(", ")[0] == OURS]
    for name, samples in seconds.items():
        rates = spread([batch / s for s in samples])
        ratios = (f"{ratio(seconds[own], samples)['median']:5.2f}" for own in ours)
        print(
            f"  {name:40} {rates['median']:8.3g} images/s ({rates['min']:.3g} to "
            f"{rates['max']:.3g})  {', '.join(ours)} / it {' '.join(ratios)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
