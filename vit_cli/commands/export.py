"""`vit export`: a model as a file that runs without this package's networks."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from vit_cli import cache
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED
from vit_cli.terminal.messages import one_line, say
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, InputError
from vit_common.exports import DYNAMIC, Export
from vit_common.files.replace import check_target
from vit_common.images.processor import BaseImageProcessor

_SUFFIXES = {".jaxexport": "jax", ".onnx": "onnx"}


def export(
    name: str,
    target: str,
    *,
    to: str | None = None,
    platforms: tuple[str, ...] | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    output: Literal["logits", "features"] = "logits",
    input_dtype: Literal["float32", "uint8"] | None = None,
    dtype: str | None = None,
    format: str | None = None,
    check: bool = True,
    force: bool = False,
    as_json: bool = False,
    hub: Mapping[str, Any] | None = None,
) -> int:
    """Export a model, check the file in a fresh process, and print what was written.

    Args:
        name: folder, weights file or Hub name of the model.
        target: the file to write.
        to: "jax" or "onnx"; None means what the suffix says.
        platforms: what a JAX program is lowered for; None means cpu, cuda and tpu.
        batch: images a call takes; "dynamic" for any number.
        output: "logits" or "features".
        input_dtype: of the pixels a JAX program takes; None means float32, normalised.
        dtype: of the computation of a JAX program; None means float32.
        format: of the weights, where it cannot be told.
        check: run the file and compare it with the model.
        force: overwrite the file.
        as_json: print one JSON object.
        hub: options of the Hub.

    Returns:
        The exit code.

    Raises:
        ViTError: it cannot be exported; nothing was written.
    """
    path = Path(target)
    to = to or _SUFFIXES.get(path.suffix.lower())
    if to is None:
        raise InputError(
            f"{target}: the suffix says what to write, .jaxexport (JAX) or .onnx (ONNX); given "
            f"{path.suffix or 'none'}. Choose one of these, or pass --to."
        )
    if to == "onnx":
        _refuse_of_jax(platforms=platforms, input=input_dtype, dtype=dtype)
    check_target(path, force=force)
    try:
        with interrupt.raises():
            common = {"batch": batch, "output": output, "check": check, "force": force}
            if to == "onnx":
                report = _export_onnx(name, path, format, dict(hub or {}), common)
            else:
                report = _export_jax(
                    name,
                    path,
                    format,
                    dict(hub or {}),
                    {
                        **common,
                        "platforms": platforms or ("cpu", "cuda", "tpu"),
                        "input_dtype": input_dtype or "float32",
                    },
                    dtype or "float32",
                )
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        return INTERRUPTED
    if as_json:
        print(json.dumps({"to": to, **report.to_dict()}, indent=2))
    else:
        for label, text in _lines(report, to, name):
            print(f"{label:10}  {one_line(text)}")
    return DONE


def _refuse_of_jax(**options: Any) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"{', '.join(given)}: for JAX programs; an ONNX file takes and computes float32 and "
            "runs where onnxruntime does. Leave it out, or write a .jaxexport file."
        )


def _export_jax(
    name: str, path: Path, format: str | None, hub: dict[str, Any], options: dict, dtype: str
) -> Export:
    from vit_cli.devices import find_devices
    from vit_flax.export import check_place, check_platforms, export, serializer

    # What is wrong with an option or the environment, before the weights are read.
    serializer()
    check_platforms(options["platforms"])
    find_devices()
    if options["check"]:
        check_place(options["platforms"])
    cache.enable()
    weights, config, processor, table = _open(name, format, options["output"], hub)

    from vit_flax.auto import FlaxAutoModel, FlaxAutoModelForImageClassification

    model = _load(
        FlaxAutoModelForImageClassification,
        FlaxAutoModel,
        options["output"],
        weights,
        config=config,
        format=table,
        dtype=dtype,
    )
    references = {}
    if options["check"] and importlib.util.find_spec("torch") is not None:
        references["PyTorch"] = _torch_answers(weights, config, table, options["output"])
    return export(model, path, image_processor=processor, references=references, **options)


def _export_onnx(
    name: str, path: Path, format: str | None, hub: dict[str, Any], options: dict
) -> Export:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "ONNX files are made by PyTorch, which is not installed; run: pip install torch onnx "
            "onnxscript onnxruntime"
        )
    from vit_torch.export import export, require

    require(options["check"])
    weights, config, processor, table = _open(name, format, options["output"], hub)
    model = _torch_model(weights, config, table, options["output"])
    return export(model, path, image_processor=processor, **options)


def _open(
    name: str, format: str | None, output: str, hub: dict[str, Any]
) -> tuple[Path, ViTConfig, BaseImageProcessor | None, str]:
    """The weights file, the configuration, what prepares images, and the format's name."""
    from vit_convert.source import find_processor, open_source

    with open_source(name, format=format, **hub) as source:
        if output == "logits" and source.head not in ("classifier", "teacher"):
            raise CheckpointError(
                f"{source.path}: these weights have no classifier, so there are no logits to "
                "export; wanted a checkpoint that was trained or fine-tuned to classify. Pass "
                "--output features for what the network makes of an image."
            )
        found = find_processor(source)
        if found is None:
            height, width = source.config.image_height_width
            warnings.warn(
                f"{name} has no preprocessor_config.json: the file will say that images are "
                f"resized to {height} x {width} (height x width) and normalised with mean and "
                "standard deviation 0.5, the Hub's defaults for a ViT.",
                UserWarning,
                stacklevel=2,
            )
        return source.path, source.config, found[0] if found else None, source.table.name


def _load(classifier: Any, base: Any, output: str, weights: Path, **options: Any) -> Any:
    if output == "logits":
        return classifier.from_pretrained(weights, **options)
    with warnings.catch_warnings():
        # That a head or a pooler of the file is left aside is what was asked for.
        warnings.filterwarnings("ignore", category=UserWarning, message=".*not used.*")
        return base.from_pretrained(weights, add_pooling_layer=False, **options)


def _torch_model(weights: Path, config: ViTConfig, table: str, output: str) -> Any:
    import torch

    from vit_torch.auto import AutoModel, AutoModelForImageClassification

    model = _load(
        AutoModelForImageClassification, AutoModel, output, weights, config=config, format=table
    )
    return model.to(torch.float32).eval()


def _torch_answers(weights: Path, config: ViTConfig, table: str, output: str) -> Any:
    """What the PyTorch twin makes of pixels, in float32; loaded when it is asked."""

    def run(pixel_values: Any) -> Any:
        import torch

        from vit_torch.export import Network

        network = Network(_torch_model(weights, config, table, output), output).eval()
        with torch.no_grad():
            return network(torch.from_numpy(pixel_values)).numpy()

    return run


def _lines(report: Export, to: str, name: str) -> Iterator[tuple[str, str]]:
    metadata = report.metadata
    C, H, W = metadata["input_shape"]
    count = "any number of" if metadata["batch"] == DYNAMIC else metadata["batch"]
    size = f"{C} x {H} x {W} (channels x height x width)"
    yield "model", f"{name} ({metadata['family']}, {metadata['dtype']})"
    if to == "onnx":
        yield "program", f"ONNX, opset {metadata['opset']['ai.onnx']}"
    else:
        yield "program", f"StableHLO for {', '.join(metadata['platforms'])}"
    kind = metadata.get("input_dtype", "float32")
    yield "takes", f"pixel_values: {count} images, {size}, {kind}"
    labels = metadata["labels"]
    yield "gives", metadata["output"] + (f" of {len(labels)} classes" if labels else "")
    yield "wrote", f"{report.path}: {report.bytes / 1e6:,.1f} MB"
    if report.check is None:
        yield "check", "none: --no-check was given"
        return
    errors = ", ".join(
        f"{error:.2g} ({other})" for other, error in report.check["max_abs_error"].items()
    )
    where = report.check.get("runtime") or f"loaded in a fresh process, {report.check['platform']}"
    yield "check", f"{where}, {report.check['images']} images: largest difference {errors}"
