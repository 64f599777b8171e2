"""One network in training, in a process of its own, told by lines on standard input what to run.

Started by `training.py`. A line is `losses N`: the losses of N steps from the first weights;
`step`: seconds by the clock and of the processor, over all cores, of one step; or `memory`: in
megabytes, the largest resident size so far, that during one more step, and how much of the latter
is files (the libraries' own code).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RATE, DECAY, CLASSES = 1e-4, 0.05, 1000

Begin = Callable[[], Callable[[], Any]]
"""From the first weights to what runs one step and gives its loss."""


def batch_of(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, C, H, W) and labels (B,)."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((count, 3, size, size), np.float32)
    return pixels, rng.integers(0, CLASSES, count)


def vit_flax(
    folder: Path, dtype: str, pixels: np.ndarray, labels: np.ndarray, *, accumulate: int = 1
) -> Begin:
    import jax
    import optax

    from vit_flax import FlaxViTForImageClassification
    from vit_flax.training import TrainState, cross_entropy, make_step

    model = FlaxViTForImageClassification.from_pretrained(folder, dtype=dtype)
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    step = make_step(model, cross_entropy(), optimizer, accumulate=accumulate)
    batch = jax.device_put({"pixel_values": pixels, "labels": labels})

    def begin() -> Callable[[], Any]:
        state = TrainState.create(model, optimizer, copy=False)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            return metrics["loss"]

        return run

    return begin


def transformers_flax(folder: Path, dtype: str, pixels: np.ndarray, labels: np.ndarray) -> Begin:
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import FlaxViTForImageClassification

    model = FlaxViTForImageClassification.from_pretrained(folder, dtype=jnp.dtype(dtype))
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    pixels, labels = jax.device_put((pixels, labels))

    def loss_of(params: Any) -> Any:
        logits = model(pixels, params=params, train=True, dropout_rng=jax.random.key(0)).logits
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params: Any, state: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step, donate_argnums=(0, 1))

    def begin() -> Callable[[], Any]:
        params = model.params  # the first step takes their memory
        state = optimizer.init(params)

        def run() -> Any:
            nonlocal params, state
            params, state, loss = step(params, state)
            jax.block_until_ready((params, state))
            return loss

        return run

    return begin


def on_torch(
    make: Callable[[], Any], dtype: str, compiled: bool, pixels: np.ndarray, labels: np.ndarray
) -> Begin:
    import torch

    images, classes = torch.from_numpy(pixels), torch.from_numpy(labels)
    half = contextlib.nullcontext
    if dtype != "float32":
        half = lambda: torch.autocast("cpu", getattr(torch, dtype))  # noqa: E731

    def begin() -> Callable[[], Any]:
        network = make().train()
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY, fused=True)
        call = torch.compile(network, dynamic=False) if compiled else network

        def run() -> Any:
            optimizer.zero_grad(set_to_none=True)
            with half():
                logits = call(images)
                logits = logits if isinstance(logits, torch.Tensor) else logits.logits
                loss = torch.nn.functional.cross_entropy(logits.float(), classes)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    return begin


def transformers_torch(
    folder: Path, dtype: str, pixels: np.ndarray, labels: np.ndarray, *, compiled: bool = False
) -> Begin:
    from transformers import ViTForImageClassification

    def make() -> Any:
        return ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa")

    return on_torch(make, dtype, compiled, pixels, labels)


def timm(
    folder: Path, dtype: str, pixels: np.ndarray, labels: np.ndarray, *, compiled: bool = False
) -> Begin:
    from contender import timm_network

    return on_torch(lambda: timm_network(folder), dtype, compiled, pixels, labels)


def memory(run: Callable[[], Any]) -> dict[str, float]:
    """Megabytes: the largest so far, that of a step, and the files in it. What is free is given
    back to the system first, such as what compiling took."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size begins anew
    float(run())
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    step, *files = (
        int(status[name].split()[0]) / 1024 for name in ("VmHWM", "RssFile", "RssShmem")
    )
    return {"process": round(largest), "step": round(step), "files": round(sum(files))}


KINDS: dict[str, Callable[..., Begin]] = {
    "vit_flax": vit_flax,
    "vit_flax, in two parts": lambda *a: vit_flax(*a, accumulate=2),
    "Transformers FlaxViT": transformers_flax,
    "Transformers torch, sdpa": transformers_torch,
    "Transformers torch, compiled": lambda *a: transformers_torch(*a, compiled=True),
    "timm": timm,
    "timm, compiled": lambda *a: timm(*a, compiled=True),
}


def main() -> None:
    """Serve until standard input ends."""
    kind, folder, dtype, count = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    size = json.loads((Path(folder) / "config.json").read_text())["image_size"]
    with contextlib.redirect_stdout(sys.stderr):
        begin = KINDS[kind](Path(folder), dtype, *batch_of(size, int(count)))
        names = ("jax", "flax", "optax", "torch", "transformers", "timm")
        versions = {name: metadata.version(name) for name in names if name in sys.modules}
        print(json.dumps(versions), file=answers, flush=True)
        run = None
        for line in sys.stdin:
            what, *rest = line.split()
            answer: Any = None
            if what == "losses":
                run = begin()
                answer = [float(run()) for _ in range(int(rest[0]))]
            elif what == "step":
                run = run or begin()
                start = time.perf_counter(), time.process_time()
                float(run())
                answer = [time.perf_counter() - start[0], time.process_time() - start[1]]
            elif what == "memory":
                answer = memory(run or begin())
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
