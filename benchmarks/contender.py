"""One network in a process of its own, told by lines on standard input what to run.

Started by `inference.py`; each contender may live in another environment. A line is the size of a
batch, or `probabilities N`; the answer is a JSON line: seconds of one forward pass on pixels that
are on the device already, or the probabilities of N fixed images.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("jax", "flax", "torch", "transformers", "timm", "onnxruntime", "openvino")

Run = Callable[[np.ndarray], Callable[[], np.ndarray]]
"""From pixels (B, C, H, W) to what runs them once and gives probabilities (B, K)."""


def pixels(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, size, size), np.float32)


def vit_flax(folder: Path, device: str, dtype: str) -> Run:
    import jax

    from vit_flax import FlaxViTForImageClassification
    from vit_flax.inference import ImageClassifier
    from vit_flax.inference.classifier import PROBABILITIES

    options: dict[str, Any] = {"dtype": dtype}
    if dtype == "int8":
        options = {"weights": "int8", "activations": "int8"}
    elif device == "gpu" and dtype != "float32":  # on a CPU the processor decides
        options["param_dtype"] = dtype
    model = FlaxViTForImageClassification.from_pretrained(folder, **options)
    classify = ImageClassifier(model)

    def prepare(x: np.ndarray) -> Callable[[], np.ndarray]:
        classify.runner(len(x))
        program = classify.engine.compile(PROBABILITIES, len(x))
        x = jax.device_put(x)
        return lambda: np.asarray(program(classify.engine.params, x)[0])

    return prepare


def transformers_flax(folder: Path, device: str, dtype: str) -> Run:
    import jax
    import jax.numpy as jnp
    from transformers import FlaxViTForImageClassification

    model = FlaxViTForImageClassification.from_pretrained(folder, dtype=jnp.dtype(dtype))
    if dtype != "float32":
        model.params = jax.tree.map(lambda p: p.astype(dtype), model.params)
    run = jax.jit(lambda p, x: jax.nn.softmax(model(x, params=p).logits.astype(jnp.float32), -1))

    def prepare(x: np.ndarray) -> Callable[[], np.ndarray]:
        x = jax.device_put(x)
        return lambda: np.asarray(run(model.params, x))

    return prepare


def products(folder: Path, device: str, dtype: str) -> Run:
    """Not a network: matrix products of as many operations as one, for what the device can do."""
    import jax

    from vit_common.config import ViTConfig
    from vit_common.flops import forward_flops

    config = ViTConfig.from_pretrained(folder)
    D, inner = config.hidden_size, config.intermediate_size
    keys = jax.random.split(jax.random.key(0), 3)
    there, back = (
        jax.random.normal(k, s, dtype)
        for k, s in zip(keys[:2], ((D, inner), (inner, D)), strict=True)
    )
    exact = jax.numpy.float32 if dtype == "bfloat16" and device == "cpu" else dtype

    @jax.jit
    def multiply(x: Any) -> Any:
        # The sums in float32, which is how XLA's CPU library multiplies bfloat16.
        product = partial(jax.numpy.matmul, preferred_element_type=exact)
        return product(product(x, there).astype(dtype), back)

    def prepare(x: np.ndarray) -> Callable[[], np.ndarray]:
        rows = len(x) * (config.num_patches + 1)
        left = jax.random.normal(keys[2], (rows, D), dtype)
        times = max(1, round(len(x) * forward_flops(config) / (4 * rows * D * inner)))

        def run() -> np.ndarray:
            result = left
            for _ in range(times):
                result = multiply(left)
            jax.block_until_ready(result)
            return np.zeros(0)

        return run

    return prepare


def on_torch(network: Any, device: str, dtype: str, compiled: bool) -> Run:
    import torch

    place = "cuda" if device == "gpu" else device
    network = network.to(place, getattr(torch, dtype)).eval()
    if compiled:
        network = torch.compile(network, dynamic=False)

    def prepare(x: np.ndarray) -> Callable[[], np.ndarray]:
        tensor = torch.from_numpy(x).to(place, getattr(torch, dtype))

        def run() -> np.ndarray:
            with torch.inference_mode():
                logits = network(tensor)
                logits = logits if isinstance(logits, torch.Tensor) else logits.logits
                return torch.softmax(logits.float(), -1).cpu().numpy()

        return run

    return prepare


def transformers_torch(folder: Path, device: str, dtype: str, way: str) -> Run:
    from transformers import ViTForImageClassification

    attention = "eager" if way == "eager" else "sdpa"
    model = ViTForImageClassification.from_pretrained(folder, attn_implementation=attention)
    return on_torch(model, device, dtype, way == "compiled")


def vit_torch(folder: Path, device: str, dtype: str) -> Run:
    from vit_torch import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa")
    return on_torch(model, device, dtype, False)


def timm_network(folder: Path) -> Any:
    """timm's network with the weights of a folder."""
    from safetensors.torch import load_file

    try:
        import timm
    except (ImportError, RuntimeError):  # on a CPU build it is where the tests have it
        sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
        from timm_models import timm

    config = json.loads((folder / "config.json").read_text())
    network = timm.models.VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        num_classes=1000,
    )
    network.load_state_dict(load_file(folder / "timm.safetensors"))
    return network


def timm(folder: Path, device: str, dtype: str, way: str) -> Run:
    return on_torch(timm_network(folder), device, dtype, way == "compiled")


def torch_module(folder: Path) -> tuple[Any, Any]:
    """Transformers' network as others take it, from pixels to logits, and an example of pixels."""
    import torch
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa").eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values).logits

    return Logits().eval(), torch.from_numpy(pixels(2, model.config.image_size))


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.exp(logits - logits.max(-1, keepdims=True))
    return logits / logits.sum(-1, keepdims=True)


def onnx_file(folder: Path) -> Path:
    """Transformers' network as an ONNX file for any number of images, as torch exports it."""
    import torch

    path = folder / "model.onnx"
    if not path.exists():
        network, example = torch_module(folder)
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
    return path


def onnx_runtime(folder: Path, device: str, dtype: str, path: Path | None = None) -> Run:
    """ONNX Runtime with its defaults; `path` of another file than `onnx_file`'s."""
    import onnxruntime

    provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    session = onnxruntime.InferenceSession(str(path or onnx_file(folder)), providers=[provider])

    def prepare(x: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: softmax(session.run(None, {"pixel_values": x})[0])

    return prepare


def openvino(folder: Path, device: str, dtype: str) -> Run:
    import openvino

    network, example = torch_module(folder)
    model = openvino.convert_model(network, example_input=example)
    hints = {"PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[dtype]

    def prepare(x: np.ndarray) -> Callable[[], np.ndarray]:
        model.reshape(x.shape)
        compiled = openvino.compile_model(model, "CPU" if device == "cpu" else "GPU", hints)
        return lambda: softmax(compiled(x)[0])

    return prepare


KINDS: dict[str, Callable[[Path, str, str], Run]] = {
    "vit_flax": vit_flax,
    "matrix products": products,
    "Transformers FlaxViT": transformers_flax,
    "Transformers torch, sdpa": lambda *a: transformers_torch(*a, "sdpa"),
    "Transformers torch, eager": lambda *a: transformers_torch(*a, "eager"),
    "Transformers torch, compiled": lambda *a: transformers_torch(*a, "compiled"),
    "vit_torch": vit_torch,
    "timm": lambda *a: timm(*a, "eager"),
    "timm, compiled": lambda *a: timm(*a, "compiled"),
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}

DTYPES: dict[str, tuple[str, ...]] = {
    "": ("float32", "bfloat16", "float16"),  # any other
    "vit_flax": ("float32", "bfloat16", "float16", "int8"),
    "ONNX Runtime": ("float32",),
    "OpenVINO": ("float32", "bfloat16"),
}
"""The dtypes that a contender is run in."""


def main() -> None:
    """Serve until standard input ends."""
    kind, folder, device, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    size = json.loads((Path(folder) / "config.json").read_text())["image_size"]
    with contextlib.redirect_stdout(sys.stderr):
        prepare = KINDS[kind](Path(folder), device, dtype)
        versions = {name: metadata.version(name) for name in PACKAGES if name in sys.modules}
        print(json.dumps(versions), file=answers, flush=True)
        ready: dict[int, Callable[[], np.ndarray]] = {}
        for line in sys.stdin:
            *what, number = line.split()
            count = int(number)
            if count not in ready:
                ready[count] = prepare(pixels(count, size))
                ready[count]()
            start = time.perf_counter()
            answer = ready[count]()
            seconds = time.perf_counter() - start
            print(json.dumps(answer.tolist() if what else seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
