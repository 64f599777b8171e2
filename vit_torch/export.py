"""`export`: a model as an ONNX file, through `torch.onnx`, with labels, preprocessing and
measurements in its metadata."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from vit_common.errors import ExistingFileError, InputError
from vit_common.exports import (
    DYNAMIC,
    Export,
    check_batch,
    check_output,
    measure,
    random_pixels,
    versions,
)
from vit_common.features import pooled_tokens
from vit_common.files.replace import check_target, staged
from vit_common.images.predictions import (
    check_processor,
    default_image_processor,
    has_several_labels,
    image_size,
)
from vit_common.images.processor import BaseImageProcessor
from vit_common.versions import PACKAGE, package_version

__all__ = ["Export", "Network", "check_program", "export", "require", "write_program"]

INPUT, BATCH_AXIS = "pixel_values", "batch"
_LARGEST = 2_000_000_000
"""Bytes of weights that a file of protocol buffers has room for."""

_IMAGES = 3


def export(
    model: Any,
    path: str | PathLike,
    *,
    image_processor: BaseImageProcessor | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    output: Literal["logits", "features"] = "logits",
    check: bool = True,
    force: bool = False,
) -> Export:
    """Write a model as ONNX: `pixel_values` (B, C, H, W), float32 and normalised, to `logits`
    (B, K) or `features` (B, D).

    The file is written beside its place, run by onnxruntime, and only then gets its name.

    Args:
        model: a PyTorch model in float32; left as it is.
        path: the file to write.
        image_processor: preprocessing of the images; None means the Hub's defaults for a ViT. It
            decides the image size where the family takes any.
        batch: number of images per call; "dynamic" for any number.
        output: "logits" of a classifier; "features" of a base network: the class token after the
            final norm, or the mean of the patches where there is no such token.
        check: run the file by onnxruntime and compare it with the model, on random pixels.
        force: overwrite the file.

    Raises:
        InputError: an option is wrong, or a package is missing.
        ConfigError: model and preprocessing contradict each other.
        ExistingFileError: the file is there already.
        MissingFileError: it cannot be written.
        CheckpointError: the exported program's outputs differ; nothing was written.
    """
    path = Path(path)
    check_batch(batch)
    check_output(type(model).__name__, model.head, output)
    check_target(path, force=force)
    require(check)
    _check_weights(model)
    config = model.config
    processor = image_processor or default_image_processor(config)
    shape = (config.num_channels, *image_size(config, processor))
    check_processor(processor, shape)

    import onnx

    started = time.perf_counter()
    was_training = model.training
    network = Network(model, output).eval()
    # Of a dynamic axis torch wants an example that is neither 0 nor 1, which it would keep.
    example = torch.zeros(batch if isinstance(batch, int) else 2, *shape)
    axes = {INPUT: {0: torch.export.Dim(BATCH_AXIS)}} if batch == DYNAMIC else None
    try:
        with torch.no_grad(), _quietly():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=axes,
            )
            assert program is not None
            graph = program.model_proto
        _strip(graph)
        metadata: dict[str, Any] = {
            "family": config.model_type,
            "input_shape": list(shape),
            "output": output,
            "batch": batch,
            "dtype": "float32",
            "opset": {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import},
            "labels": (
                [str(config.id2label[i]) for i in range(config.num_labels)]
                if output == "logits"
                else []
            ),
            "several": has_several_labels(config),
            "versions": versions(PACKAGE, "torch", "onnx", "onnxscript"),
        }
        texts = {
            **{name: _text(value) for name, value in metadata.items()},
            "config": config.to_json_string(),
            "preprocessing": processor.to_json_string(),
        }
        onnx.helper.set_model_props(graph, texts)
        report = Export(path, 0, metadata, None, {"tracing": time.perf_counter() - started})
        with staged(path) as temporary:
            temporary.write_bytes(graph.SerializeToString())
            if check:
                started = time.perf_counter()
                count = batch if isinstance(batch, int) else _IMAGES
                _, pixels = random_pixels(processor, shape, count)
                with torch.no_grad():
                    wanted = {"PyTorch": network(torch.from_numpy(pixels)).numpy()}
                import onnxruntime

                report.check = {
                    "runtime": f"onnxruntime {onnxruntime.__version__}",
                    "platform": "cpu",
                    **measure(_run(temporary, pixels), wanted, "float32"),
                }
                # Protocol buffers that follow each other are one: what was run stays as it is.
                with temporary.open("ab") as stream:
                    entry = onnx.StringStringEntryProto(key="check", value=_text(report.check))
                    stream.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())
                report.seconds["check"] = time.perf_counter() - started
            report.bytes = temporary.stat().st_size
    finally:
        model.train(was_training)
    return report


def write_program(path: str | PathLike) -> Path:
    """Write a Python program beside an ONNX file that classifies images with it. It needs
    onnxruntime, numpy and Pillow alone, and prepares images as the model's image processor does.

    Args:
        path: the ONNX file, such as "m.onnx"; the program is "m_onnx.py".

    Returns:
        The program's path.

    Raises:
        ExistingFileError: a file of that name is there that this function did not write.
        MissingFileError: it cannot be written.
    """
    target = check_program(path)
    with staged(target) as temporary:
        temporary.write_bytes(_PROGRAM.read_bytes())
    return target


_PROGRAM = Path(__file__).with_name("onnx_program.py")


def check_program(path: str | PathLike) -> Path:
    """The path of an ONNX file's program; ExistingFileError if somebody else's file is there."""
    target = Path(path)
    target = target.with_name(f"{target.stem}_onnx.py")
    first = _PROGRAM.read_bytes().splitlines()[0]
    ours = False
    with suppress(OSError), target.open("rb") as stream:
        ours = stream.read(len(first)) == first
    if target.exists() and not ours:
        raise ExistingFileError(
            f"{target}: already there, and not a program that belongs to an ONNX file; nothing was "
            "written. Move it, or choose another name for the ONNX file."
        )
    check_target(target, force=True)
    return target


def require(check: bool) -> None:
    """Raise InputError where a package is missing that is needed."""
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if check else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return
    *most, last = missing
    names = f"{', '.join(most)} and {last}" if most else last
    are = "are" if most else "is"
    text = f"ONNX needs {names}, which {are} not installed; run: pip install {' '.join(missing)}"
    if missing == ["onnxruntime"]:
        text += "; or pass --no-check (in Python `check=False`) to write a file that was not run"
    raise InputError(f"{text}.")


class Network(nn.Module):
    """A model as a function of images alone to one array."""

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.model(
            pixel_values, output_attentions=False, output_hidden_states=False, return_dict=True
        )
        if self.output == "logits":
            return found.logits  # (B, K)
        return pooled_tokens(found.last_hidden_state, self.model.config)  # (B, D)


def _check_weights(model: nn.Module) -> None:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if kinds - {"float32"}:
        raise InputError(
            f"ONNX files are written in float32; given a model of {', '.join(sorted(kinds))}. "
            "Convert it: `model.float()`."
        )
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if nbytes > _LARGEST:
        raise InputError(
            f"one ONNX file holds 2 GB; the weights take {nbytes / 1e9:.1f} GB. Export for JAX "
            "instead (a target that does not end in .onnx), which has no such limit."
        )


def _run(path: Path, pixels: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {INPUT: pixels})[0]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _strip(graph: Any) -> None:
    """Take out what the exporter noted for its own debugging: lines and paths of this machine."""
    parts = [graph.graph, *graph.functions]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
        values = [*part.value_info, *getattr(part, "initializer", ())]
        if part is graph.graph:
            values += [*part.input, *part.output]
        for entry in (*part.node, *values):
            entry.ClearField("metadata_props")
            entry.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.producer_name, graph.producer_version = PACKAGE, package_version()


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence torch's warnings about its own deprecations and about packages that are not used
    here."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
