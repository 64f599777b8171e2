"""How fast and how exact are 8-bit integers here, beside bfloat16 and float32, and beside peers?

    python benchmarks/int8_peers.py [--model tiny|base|FOLDER] [--batches 1 8 32] [--rounds 5]
        [--only NAME ...] [--files FOLDER]

Contenders hold the same weights and take turns in one process, one forward pass each a round. Their
probabilities are compared with those of vit_flax in float32 first: those of float32 must agree, of
the others the largest change of a probability is reported. With `--model FOLDER` the weights are
real; without, random. ONNX files are made with PyTorch and quantised dynamically by ONNX Runtime;
OpenVINO runs the float32 file, and one whose weights NNCF compressed to 8 bits, with activations
quantised as it runs. What is not installed is left out. `--files` keeps the files for another run.
Writes `results/int8-MODEL-MACHINE.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, machine, parse, ratio, require_agreement, spread, write_result

sys.path.insert(0, str(ROOT))
OURS, INTEGERS = "vit_flax float32", "vit_flax int8 weights and activations"
EXACT = (OURS, "torch float32", "ONNX Runtime float32", "OpenVINO float32")
BOUND = 2e-5  # of a probability
Run = Callable[[np.ndarray], np.ndarray]
"""Pixels (B, 3, H, W) to probabilities (B, K)."""


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def ours(source: str, **options: Any) -> Run:
    from vit_flax.inference import ImageClassifier
    from vit_flax.inference.classifier import PROBABILITIES

    classify = ImageClassifier.from_pretrained(source, **options)

    def run(x: np.ndarray) -> np.ndarray:
        classify.runner(len(x))
        program = classify.engine.compile(PROBABILITIES, len(x))
        return np.asarray(program(classify.engine.params, x)[0])

    return run


def torch_network(source: str) -> Any:
    from vit_torch import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(source).eval()


def on_torch(source: str, quantised: bool) -> Run:
    import torch

    network = torch_network(source)
    if quantised:
        network = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, torch.qint8)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return torch.softmax(network(torch.from_numpy(x)).logits, -1).numpy()

    return run


def onnx_file(source: str, files: Path) -> Path:
    """The network as ONNX, for any number of images, in float32."""
    import torch

    path = files / "float32.onnx"
    if not path.exists():
        network = torch_network(source)

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                return self.network(pixel_values).logits

        H, W = network.config.image_height_width
        example = torch.zeros(2, network.config.num_channels, H, W)
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        torch.onnx.export(
            Logits(),
            (example,),
            path,
            input_names=["pixel_values"],
            dynamic_shapes=(batch,),
            dynamo=True,
            external_data=False,
        )
    return path


def on_onnxruntime(source: str, files: Path, quantised: bool) -> Run:
    import onnxruntime

    path = onnx_file(source, files)
    if quantised:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        exact, path = path, files / "int8.onnx"
        if not path.exists():
            quantize_dynamic(
                exact,
                path,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: softmax(session.run(None, {"pixel_values": x})[0])


def on_openvino(source: str, files: Path, kind: str) -> Run:
    import openvino

    model = openvino.Core().read_model(onnx_file(source, files))
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if kind == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 2**32 - 1  # a row at a time
    compiled = openvino.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
    return lambda x: softmax(compiled(x)[0])


def contenders(source: str, files: Path) -> dict[str, Callable[[], Run]]:
    return {
        OURS: lambda: ours(source),
        "vit_flax bfloat16": lambda: ours(source, dtype="bfloat16", param_dtype="bfloat16"),
        "vit_flax int8 weights": lambda: ours(source, weights="int8"),
        INTEGERS: lambda: ours(source, weights="int8", activations="int8"),
        "torch float32": lambda: on_torch(source, False),
        "torch int8 dynamic": lambda: on_torch(source, True),
        "ONNX Runtime float32": lambda: on_onnxruntime(source, files, False),
        "ONNX Runtime int8 dynamic": lambda: on_onnxruntime(source, files, True),
        "OpenVINO float32": lambda: on_openvino(source, files, "float32"),
        "OpenVINO int8": lambda: on_openvino(source, files, "int8"),
    }


def make(name: str, files: Path) -> str:
    """A folder with random weights of a preset; a folder itself."""
    if Path(name).is_dir():
        return name
    folder = files / name
    if not folder.exists():
        import torch

        from vit_common.presets import preset
        from vit_torch import ViTForImageClassification

        torch.manual_seed(0)
        config = preset(name, num_labels=1000, layer_norm_eps=1e-6)
        ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Run, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=None, choices=contenders("", Path()))
    parser.add_argument("--files", type=Path)
    parser.add_argument("--add", action="store_true", help="keep batches of an earlier run")
    arguments = parse(parser, model="tiny", batches=[1, 2], rounds=1, only=[OURS, INTEGERS])
    with tempfile.TemporaryDirectory() as temporary:
        files = arguments.files or Path(temporary)
        files.mkdir(parents=True, exist_ok=True)
        source = make(arguments.model, files)
        found: dict[str, Run] = {}
        left_out = {}
        for name, build in contenders(source, files).items():
            if arguments.only and name not in (OURS, *arguments.only):
                continue
            try:
                found[name] = build()
            except (ImportError, RuntimeError) as error:
                left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
        measure(arguments, source, found, left_out)


def measure(
    arguments: argparse.Namespace, source: str, found: dict[str, Run], left_out: dict[str, str]
) -> None:
    from vit_convert.source import open_source
    from vit_flax.int8 import choose_product

    with open_source(source) as opened:
        config = opened.config
    shape = (config.num_channels, *config.image_height_width)
    pixels = np.random.default_rng(0).standard_normal((max(arguments.batches), *shape), np.float32)
    answers = {name: run(pixels[: min(arguments.batches)]) for name, run in found.items()}
    differences = {n: float(np.abs(a - answers[OURS]).max()) for n, a in answers.items()}
    require_agreement({n: x for n, x in differences.items() if n in EXACT}, BOUND)
    rows = {}
    for batch in arguments.batches:
        x = pixels[:batch]
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for run in found.values():
            run(x)
        for _ in range(arguments.rounds):
            for name, run in found.items():
                started = time.perf_counter()
                run(x)
                seconds[name].append(time.perf_counter() - started)
        rows[batch] = seconds
        print(f"batch {batch}")
        for name, samples in seconds.items():
            rates = spread([batch / s for s in samples])
            times = ratio(samples, seconds[OURS])["median"]
            print(
                f"  {name:38} {rates['median']:8.3g} images/s ({rates['min']:.3g} to "
                f"{rates['max']:.3g}), {times:.2f} times {OURS}; probabilities move by "
                f"{differences[name]:.1g}",
                flush=True,
            )
    product = choose_product()
    versions = {}
    for package in ("jax", "torch", "onnxruntime", "openvino", "nncf"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    result = {
        "question": __doc__.splitlines()[0],
        "model": Path(arguments.model).name,
        "rounds": arguments.rounds,
        "versions_of_peers": versions,
        "integer_products": product._asdict(),
        "left_out": left_out,
        "largest_change_of_a_probability": differences,
        "images_per_second": {
            batch: {n: spread([batch / s for s in samples]) for n, samples in seconds.items()}
            for batch, seconds in rows.items()
        },
        "times_as_fast_as_float32": {
            batch: {n: ratio(samples, seconds[OURS]) for n, samples in seconds.items()}
            for batch, seconds in rows.items()
        },
    }
    if arguments.quick:
        return
    name = f"int8-{Path(arguments.model).name}"
    earlier = RESULTS / f"{name}-{machine()}.json"
    if arguments.add and earlier.exists():
        before = json.loads(earlier.read_text())
        for table in ("images_per_second", "times_as_fast_as_float32"):
            result[table] = before[table] | {str(batch): x for batch, x in result[table].items()}
        result["left_out"] = before["left_out"] | left_out
        changes = "largest_change_of_a_probability"
        result[changes] = before[changes] | result[changes]
    write_result(name, result)


if __name__ == "__main__":
    main()
