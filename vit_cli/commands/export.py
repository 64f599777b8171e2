"""`vit export`: a model as a file that runs without this package's networks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vit_cli.options import DTYPES, Options, Parser, Reading, add_reading, positive, some_of
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED
from vit_cli.terminal.messages import say
from vit_cli.terminal.results import print_titled
from vit_common.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from vit_common.exports import Export
    from vit_common.images.processor import BaseImageProcessor

_SUFFIXES = {".jaxexport": "jax", ".onnx": "onnx"}
# As `vit_flax.export.read` has them; repeated here so that `--help` need not load it.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _batch(text: str) -> int | str:
    if text == "dynamic":
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        message = f"must be a positive integer or dynamic; given {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def add_options(parser: Parser) -> None:
    parser.usage = "vit export [options] MODEL OUT"
    parser.description = (
        "Write a model as one file that runs without Flax and without this package's networks: a "
        "StableHLO program for JAX (.jaxexport), or ONNX (.onnx), with its weights, preprocessing "
        "and labels. The file is run and compared with the model before it replaces anything."
    )
    parser.add_names(
        "MODEL OUT",
        "model (folder, weights file or name on the Hub), and the file to write",
        least=2,
        most=2,
        wanted="MODEL and OUT",
    )
    parser.add_argument(
        "--to", choices=("jax", "onnx"), help="what to write (default: what the suffix says)"
    )
    parser.add_argument(
        "--platforms",
        metavar="NAMES",
        type=some_of(_PLATFORMS),
        help="platforms of a JAX program: cpu, cuda, rocm, tpu, separated by commas (default: "
        "cpu,cuda,tpu)",
    )
    parser.add_argument(
        "--batch",
        metavar="N|dynamic",
        type=_batch,
        default="dynamic",
        help="images per call: a number, or dynamic for any number (default: dynamic)",
    )
    parser.add_argument(
        "--output",
        choices=("logits", "features"),
        default="logits",
        help="logits, or features for a model without a classifier: the class token after the last "
        "norm (default: logits)",
    )
    parser.add_argument(
        "--input",
        choices=("float32", "uint8"),
        help="float32 pixels, rescaled and normalised, or uint8 pixels, which the program rescales "
        "and normalises (default: float32)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compute dtype of a JAX program (default: float32)"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the file and compare it with the model, and with the PyTorch twin where torch is "
        "installed",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_reading(parser)


def run(options: Options) -> int:
    """Export a model, check the file in a fresh process, and print what was written.

    Raises:
        ViTError: it cannot be exported; nothing was written.
    """
    from vit_common.files.replace import check_target

    name, target = options.names
    path = Path(target)
    to = options.to or _SUFFIXES.get(path.suffix.lower())
    if to is None:
        raise InputError(
            f"{target}: the suffix says what to write, .jaxexport (JAX) or .onnx (ONNX); given "
            f"{path.suffix or 'none'}. Choose one of these, or pass --to."
        )
    if to == "onnx":
        _refuse_of_jax(platforms=options.platforms, input=options.input, dtype=options.dtype)
    check_target(path, force=options.force)
    try:
        with interrupt.raises():
            report = (_export_onnx if to == "onnx" else _export_jax)(name, path, options)
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        return INTERRUPTED
    if options.json:
        print(json.dumps({"to": to, **report.to_dict()}, indent=2))
    else:
        print_titled(_lines(report, to, name), 10)
    return DONE


def _common(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("batch", "output", "check", "force")}


def _refuse_of_jax(**options: Any) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"{', '.join(given)}: for JAX programs; an ONNX file takes and computes float32 and "
            "runs where onnxruntime does. Leave it out, or write a .jaxexport file."
        )


def _export_jax(name: str, path: Path, options: Options) -> Export:
    from vit_cli.runtime import enable_cache, find_devices
    from vit_flax.export import check_place, check_platforms, export, serializer

    platforms = options.platforms or ("cpu", "cuda", "tpu")
    # What is wrong with an option or the environment, before the weights are read.
    serializer()
    check_platforms(platforms)
    find_devices()
    if options.check:
        check_place(platforms)
    enable_cache()
    found = _open(name, options)

    from vit_flax.auto import FlaxAutoModel, FlaxAutoModelForImageClassification

    classes = FlaxAutoModelForImageClassification, FlaxAutoModel
    model = found.load(*classes, dtype=options.dtype or "float32")
    references = {}
    if options.check and importlib.util.find_spec("torch") is not None:
        references["PyTorch"] = _torch_answers(found)
    return export(
        model,
        path,
        image_processor=found.processor,
        references=references,
        platforms=platforms,
        input_dtype=options.input or "float32",
        **_common(options),
    )


def _export_onnx(name: str, path: Path, options: Options) -> Export:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "ONNX files are made by PyTorch, which is not installed; run: pip install torch onnx "
            "onnxscript onnxruntime"
        )
    from vit_torch.export import check_program, export, require, write_program

    require(options.check)
    if path.suffix.lower() == ".onnx":
        check_program(path)
    found = _open(name, options)
    report = export(_torch_model(found), path, image_processor=found.processor, **_common(options))
    if path.suffix.lower() == ".onnx":
        report.program = write_program(path)
    return report


class _Found(NamedTuple):
    """What is to be exported: the model, how to load it, what prepares images, and whether
    logits or features come out."""

    name: str
    loading: dict[str, Any]
    processor: BaseImageProcessor | None
    output: str

    def load(self, classifier: Any, base: Any, **options: Any) -> Any:
        """The model, of one of two classes."""
        options |= self.loading
        if self.output == "logits":
            return classifier.from_pretrained(self.name, **options)
        with warnings.catch_warnings():
            # That a head or a pooler of the file is left aside is what was asked for.
            warnings.filterwarnings("ignore", category=UserWarning, message=".*not used.*")
            return base.from_pretrained(self.name, add_pooling_layer=False, **options)


def _open(name: str, options: Options) -> _Found:
    from vit_convert.source import find_processor, open_source

    reading = Reading.of(options)
    with open_source(name, **reading.for_source) as source:
        logits = options.output == "logits"
        if source.config.sub_configs and not (logits and source.classifies):
            tower = f"{type(source.config).__name__.removesuffix('Config')}VisionModel"
            raise CheckpointError(
                f"{source.path}: these weights are of images and texts, and an export holds a "
                f"network of images alone. Save the image tower, with `{tower}.from_pretrained` "
                "and its `save_pretrained`, and export that with --output features."
            )
        if logits and not source.classifies:
            raise CheckpointError(
                f"{source.path}: these weights have no classifier, so there are no logits to "
                "export; wanted a checkpoint that was trained or fine-tuned to classify. Pass "
                "--output features to export the backbone's output."
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
        return _Found(name, reading.keywords, found[0] if found else None, options.output)


def _torch_model(found: _Found) -> Any:
    import torch

    from vit_torch.auto import AutoModel, AutoModelForImageClassification

    return found.load(AutoModelForImageClassification, AutoModel).to(torch.float32).eval()


def _torch_answers(found: _Found) -> Any:
    """What the PyTorch twin makes of pixels, in float32; loaded when it is asked."""

    def run(pixel_values: Any) -> Any:
        import torch

        from vit_torch.export import Network

        network = Network(_torch_model(found), found.output).eval()
        with torch.no_grad():
            return network(torch.from_numpy(pixel_values)).numpy()

    return run


def _lines(report: Export, to: str, name: str) -> Iterator[tuple[str, str]]:
    from vit_common.exports import DYNAMIC

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
    if report.program is not None:
        yield "beside it", f"{report.program}: classifies images with onnxruntime alone"
    if report.check is None:
        yield "check", "none: --no-check was given"
        return
    errors = ", ".join(
        f"{error:.2g} ({other})" for other, error in report.check["max_abs_error"].items()
    )
    where = report.check.get("runtime") or f"loaded in a fresh process, {report.check['platform']}"
    yield "check", f"{where}, {report.check['images']} images: largest difference {errors}"
