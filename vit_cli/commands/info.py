"""`vit info`: what the commands run on, and what a model is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vit_cli.options import DTYPES, Options, Parser, Reading, add_reading, positive
from vit_cli.runtime import cache_directory, compiled_for, describe_devices, find_devices
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.messages import counted
from vit_cli.terminal.results import print_titled

if TYPE_CHECKING:
    from vit_common.config import ViTConfig
    from vit_convert.source import Source

Report = dict[str, Any]

_FAMILIES = {
    "vit": "ViT",
    "deit": "DeiT (distilled)",
    "beit": "BEiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3",
}
_LETTERS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}
_LABELS_SHOWN = 5
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "huggingface_hub", "torch")


def add_options(parser: Parser) -> None:
    parser.usage = "vit info [options] [MODEL]"
    parser.description = (
        "Show versions, devices and precision; with a model, describe it. The weights of a model "
        "on the Hub are described if they were downloaded before; only its small files are fetched."
    )
    parser.add_names(
        "MODEL", "folder, weights file, or name on the Hub", least=0, most=1, wanted="one model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--batch",
        metavar="N",
        type=positive,
        default=1,
        help="say which attention kernel runs here for N images at once, and why (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="compute dtype of that attention kernel (default: float32)",
    )
    add_reading(parser, loads=False)


def run(options: Options) -> int:
    """Print versions, devices and precision, and with a model, what it is.

    Raises:
        ViTError: the model is not there, or is none.
    """
    from vit_common.versions import PACKAGE, versions

    # The model first: a wrong name is reported without the seconds that JAX takes.
    described = None
    if options.names:
        reading = Reading.of(options)
        described = describe_model(options.names[0], reading, options.batch, options.dtype)
    place = cache_directory()
    report: Report = {
        "versions": versions(PACKAGE, "python", *_PACKAGES),
        **describe_devices(),
        "half_products": describe_halves(),
        "integer_products": describe_integers(),
        "compilation_cache": None if place is None else str(place),
    }
    if described is not None:
        report["model"] = described
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_titled(_lines(report), 17)
    return DONE


# -- a model


def describe_model(name: str, reading: Reading, batch: int = 1, dtype: str = "float32") -> Report:
    """What the files of a model say, and which attention kernel runs. No weight is read, and none
    is downloaded.

    Raises:
        ViTError: there is no such model, or a file of it is refused.
    """
    from vit_common.config import CONFIG_NAME
    from vit_common.errors import MissingFileError
    from vit_common.files.hub import AbsentFileError, ModelFiles
    from vit_common.files.texts import read_json
    from vit_common.flops import multiply_adds
    from vit_common.images.auto import AutoImageProcessor
    from vit_common.images.sizes import processor_at_size
    from vit_common.parameters import parameter_shapes
    from vit_convert.source import config_from_dict, find_processor, open_source

    files = ModelFiles(name, **reading.hub)
    path = files.find(CONFIG_NAME)
    table = None if path is None else read_json(path)
    weights: Report | None = None
    try:
        with open_source(
            files, format=reading.format, overrides=reading.overrides, fetch=False
        ) as source:
            config, head = source.config, source.head
            found = find_processor(source)
            weights = _describe_weights(source)
            pooled = any(key.startswith("pooler.") for key in source.mapped.tensors)
    except MissingFileError:
        # Not here: what the small files say.
        if table is None or "model_type" not in table:
            raise
        config, head, pooled = config_from_dict(table, **reading.overrides), "classifier", False
        try:
            made = AutoImageProcessor.from_pretrained(name, **reading.hub)
            others = {k: v for k, v in reading.overrides.items() if k != "image_size"}
            trained = config_from_dict(table, **others).image_height_width
            if trained != config.image_height_width:
                made = processor_at_size(made, trained, config.image_height_width)
            found = made, ""
        except AbsentFileError:
            found = None
    processor = None if found is None else found[0]
    parameters = sum(
        math.prod(shape)
        for shape in parameter_shapes(config, head, add_pooling_layer=pooled).values()
    )
    macs = multiply_adds(config, head)
    height, width = config.image_height_width
    return {
        "name": name,
        "family": _FAMILIES.get(config.model_type, config.model_type),
        "variant": _variant(config),
        "head": head,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "patch": list(config.patch_height_width),
        "tokens": config.num_prefix_tokens + config.num_patches,
        "parameters": parameters,
        "attention": describe_attention(config, batch, dtype),
        "gflops_per_image": round(2 * macs / 1e9, 6),
        "input": {"channels": config.num_channels, "height": height, "width": width},
        "preprocessing": None if processor is None else processor.to_dict(),
        "labels": list(map(str, config.id2label.values()))
        if head in ("classifier", "teacher")
        else [],
        "weights": weights,
    }


def describe_attention(config: ViTConfig, batch: int, dtype: str) -> Report:
    """The attention kernel for so many images on the device that JAX would use, and why."""
    import jax

    from vit_flax.attention import choose, cudnn_missing

    platform = compiled_for(find_devices()[0])
    S, A = config.num_prefix_tokens + config.num_patches, config.num_attention_heads
    biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
    choice = choose(
        "auto",
        platform,
        (batch, S, A, config.hidden_size // A),
        dtype,
        bias=(1, A, S, S) if biased else None,
        precision=jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        cudnn=cudnn_missing() if platform == "cuda" else None,
    )
    return {"batch": batch, "dtype": dtype, "kernel": choice.name, "why": choice.reason}


def describe_halves() -> Report:
    """The operands of products of `dtype="bfloat16"` on the device that JAX would use, and why."""
    from vit_flax.cpu import choose_half_products

    platform = find_devices()[0].platform
    if platform != "cpu":
        return {"kind": "bfloat16", "why": f"{platform} multiplies bfloat16"}
    choice = choose_half_products()
    return {"kind": choice.kind, "why": choice.reason}


def describe_integers() -> Report:
    """How `activations="int8"` multiplies integers on the device that JAX would use, and why."""
    from vit_flax.int8 import choose_product

    choice = choose_product()
    return {"kind": choice.kind, "why": choice.reason}


def _variant(config: ViTConfig) -> str | None:
    """Such as "B/16", if the sizes are those of a named model."""
    from vit_common.presets import PRESETS

    sizes = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    )
    patch = config.patch_height_width
    for name, (*preset, _) in PRESETS.items():
        if sizes == tuple(preset) and patch[0] == patch[1]:
            return f"{_LETTERS[name]}/{patch[0]}"
    return None


def _describe_weights(source: Source) -> Report:
    """The weights file."""
    checkpoint = source.checkpoint
    return {
        "path": str(source.path),
        "container": checkpoint.container,
        "format": source.table.name,
        "dtypes": sorted({str(tensor.dtype) for tensor in checkpoint.values()}),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "files": len(checkpoint.files),
    }


# -- as text


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    for name, version in report["versions"].items():
        yield (name, version or "not installed")
    yield "", ""
    kinds = report["devices"]
    yield ("platform", report["platform"])
    yield ("devices", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
    precision = report["matmul_precision"]
    yield (
        "precision",
        f"float32 matrix products in {precision['float32']} (setting: {precision['setting']})",
    )
    halves = report["half_products"]
    yield ("bfloat16", f"products of {halves['kind']}: {halves['why']}")
    integers = report["integer_products"]
    other = {"float32": "float32"}.get(integers["kind"], "int8")
    yield ("8-bit products", f"{integers['kind']} x {other}: {integers['why']}")
    yield ("compiled code", report["compilation_cache"] or "not kept between runs")
    if "model" in report:
        yield "", ""
        yield from _model_lines(report["model"])


def _model_lines(model: Report) -> Iterator[tuple[str, str]]:
    variant = f"-{model['variant']}" if model["variant"] else ""
    yield ("model", model["name"])
    yield ("family", model["family"] + variant)
    yield (
        "sizes",
        f"{model['layers']} layers, width {model['width']}, {model['heads']} heads, MLP width "
        f"{model['mlp_width']}, patches {model['patch'][0]} x {model['patch'][1]}, "
        f"{model['tokens']} tokens",
    )
    yield ("parameters", f"{model['parameters']:,}")
    kernel = model["attention"]
    what = f"{counted(kernel['batch'])}, {kernel['dtype']}"
    yield ("attention", f"{kernel['kernel']}: {kernel['why']} ({what})")
    yield ("GFLOP/image", f"{model['gflops_per_image']:.4g}")
    size = model["input"]
    yield (
        "input",
        f"{size['channels']} x {size['height']} x {size['width']} (channels x height x width)",
    )
    yield ("prepared by", _preparation(model["preprocessing"]))
    labels = model["labels"]
    if labels:
        between = "; " if any("," in label for label in labels) else ", "
        shown = between.join(labels[:_LABELS_SHOWN])
        shown += f"{between}... {labels[-1]}" if len(labels) > _LABELS_SHOWN else ""
        yield ("labels", f"{len(labels)}: {shown}")
    else:
        yield ("labels", "none: the weights have no classifier")
    weights = model["weights"]
    if weights is None:
        yield ("weights", "none here, or not downloaded yet")
        return
    yield ("weights", weights["path"])
    parts = f" in {weights['files']} files" if weights["files"] > 1 else ""
    yield (
        "",
        f"{weights['container']}, format {weights['format']}, {', '.join(weights['dtypes'])}, "
        f"{weights['bytes'] / 1e6:,.1f} MB{parts}",
    )


def _preparation(options: Report | None) -> str:
    from PIL.Image import Resampling

    if options is None:
        return "no preprocessor_config.json; the Hub's defaults for a ViT are used"
    steps = []
    if options["do_resize"]:
        size = options["size"]
        edge = size.get("shortest_edge")
        target = f"shortest edge {edge}" if edge else f"{size['height']} x {size['width']}"
        steps.append(f"resize to {target} ({Resampling(options['resample']).name.lower()})")
    if options.get("do_center_crop") and options.get("crop_size"):
        size = options["crop_size"]
        steps.append(f"centre crop {size['height']} x {size['width']}")
    if options["do_rescale"]:
        steps.append(f"times {_short(options['rescale_factor'])}")
    if options["do_normalize"]:
        mean, std = options["image_mean"], options["image_std"]
        steps.append(f"mean {_numbers(mean)}, standard deviation {_numbers(std)}")
    return ", ".join(steps) or "nothing"


def _short(factor: float) -> str:
    return "1/255" if math.isclose(factor, 1 / 255) else f"{factor:g}"


def _numbers(values: Any) -> str:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{each:g}" for each in values)
