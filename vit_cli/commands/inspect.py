"""`vit inspect`: what a weights file holds, whether or not it is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vit_cli.options import Options, Parser, Reading, add_reading, positive
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.messages import one_line
from vit_cli.terminal.results import print_titled
from vit_common.errors import CheckpointError, ConfigError, InputError, MissingFileError, some

if TYPE_CHECKING:
    from vit_common.files.checkpoint import Checkpoint
    from vit_common.files.hub import ModelFiles

_SHOWN = 8


def add_options(parser: Parser) -> None:
    parser.usage = "vit inspect [options] FILE"
    parser.description = (
        "Show what a weights file holds: its format, family and sizes, anything unusual in it, and "
        "its first tensors; of a LoRA adapter, its rank, layers and base model. No weights of a "
        "model are loaded."
    )
    parser.add_names(
        "FILE",
        "weights file, index of shards, folder, or name on the Hub",
        least=1,
        most=1,
        wanted="one file",
    )
    parser.add_argument(
        "--lines", metavar="N", type=positive, default=10, help="tensors to list (default: 10)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with every tensor"
    )
    add_reading(parser, loads=False)


def run(options: Options) -> int:
    """Print what a weights file holds, as text or as one JSON object with every tensor.

    Raises:
        ViTError: there is no such file, or it cannot be read at all.
    """
    report = describe(options.names[0], Reading.of(options))
    if options.json:
        print(json.dumps(report, indent=2))
        return DONE
    print_titled(_lines(report), 12)
    rows, lines = report["tensors"], options.lines
    shown = rows if lines >= len(rows) else rows[:lines]
    width = max((len(row["name"]) for row in shown), default=0)
    print()
    for row in shown:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        print(f"  {one_line(row['name']):{width}}  {row['dtype']:9} {shape}")
    if len(shown) < len(rows):
        print(f"  ... and {len(rows) - len(shown)} more (--lines N, --json)")
    return DONE


def describe(name: str, reading: Reading) -> dict[str, Any]:
    """Everything `vit inspect --json` prints. No weight is read.

    Raises:
        ViTError: there is no such file, or it cannot be read at all.
    """
    from vit_common.files.checkpoint import open_checkpoint
    from vit_common.files.hub import ModelFiles
    from vit_convert.adapters import find_adapter

    files = ModelFiles(name, **reading.hub)
    adapter = find_adapter(files)
    path = files.weights() if adapter is None else adapter
    with open_checkpoint(path) as checkpoint:
        report: dict[str, Any] = {
            "path": str(path),
            "container": checkpoint.container,
            "files": len(checkpoint.files),
            "bytes": sum(file.stat().st_size for file in checkpoint.files),
            "metadata": {k: v for k, v in checkpoint.metadata.items() if len(v) < 200},
            "dtypes": sorted({t.dtype.name for t in checkpoint.values()}),
            "parameters": sum(math.prod(t.shape) for t in checkpoint.values()),
            "network": None,
            "adapter": None,
            "odd": _odd(checkpoint),
            "tensors": [
                {"name": key, "dtype": t.dtype.name, "shape": list(t.shape)}
                for key, t in checkpoint.items()
            ],
        }
    if adapter is None:
        _add_network(report, name, reading)
    else:
        _add_adapter(report, files)
    return report


def _add_adapter(report: dict[str, Any], files: ModelFiles) -> None:
    """What the tensors change of which base model; or why they do not."""
    from vit_convert.adapters import read_adapter

    try:
        adapter = read_adapter(files)
    except (CheckpointError, ConfigError) as error:
        report["odd"].append(str(error))
        return
    settings = adapter.settings
    report["adapter"] = {
        "describes": adapter.describe(),
        "names": adapter.generation,
        "family": adapter.family,
        "base": settings.base,
        "revision": settings.revision,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "rslora": settings.rslora,
        "dora": settings.dora,
        "bias": settings.bias,
        "layers": sorted(adapter.layers),
        "saved": sorted(adapter.saved),
    }


def _odd(checkpoint: Checkpoint) -> list[str]:
    """What is unusual about the tensors themselves."""
    from vit_common.config import FLOATS

    odd = []
    dtypes: dict[str, list[str]] = {}
    for key, tensor in checkpoint.items():
        dtypes.setdefault(tensor.dtype.name, []).append(key)
    floats = [dtype for dtype in dtypes if dtype in FLOATS]
    if len(floats) > 1:
        counts = ", ".join(f"{len(dtypes[dtype])} of {dtype}" for dtype in floats)
        odd.append(f"several dtypes: {counts}")
    for dtype, keys in dtypes.items():
        if dtype not in FLOATS:
            odd.append(f"{dtype}, which is not floating: {some(keys, _SHOWN)}")
    empty = [key for key, tensor in checkpoint.items() if math.prod(tensor.shape) == 0]
    if empty:
        odd.append(f"empty: {some(empty, _SHOWN)}")
    return odd


def _inputs(config: Any) -> dict[str, Any]:
    """The sizes of what a network takes."""
    if config.is_text:
        return {"patch": None, "image": None, "tokens": config.max_position_embeddings}
    return {
        "patch": list(config.patch_height_width),
        "image": list(config.image_height_width),
        "tokens": config.num_prefix_tokens + config.num_patches,
    }


def _add_network(report: dict[str, Any], name: str, reading: Reading) -> None:
    """What the tensors are the network of; or why they are none."""
    from vit_common.files.checkpoint import open_checkpoint
    from vit_convert.source import find_processor, open_source, read_tensors

    try:
        with open_source(name, **reading.for_source) as source:
            config = source.config
            processor = find_processor(source)
            report["network"] = {
                "format": source.table.name,
                "describes": source.table.describes,
                "under": source.root.path,
                "family": config.model_type,
                "head": source.head,
                "layers": config.num_hidden_layers,
                "width": config.hidden_size,
                "heads": config.num_attention_heads,
                "mlp_width": config.intermediate_size,
                **_inputs(config),
                "classes": config.num_labels if source.classifies else 0,
                "activation": str(config.hidden_act),
                "layer_norm_eps": config.layer_norm_eps,
                "position_resize": config.position_resize,
                "preprocessing": None if processor is None else processor[1],
            }
            ignored, unexplained = source.ignored, source.unexplained
    except (CheckpointError, ConfigError, MissingFileError, InputError) as error:
        if isinstance(error, InputError) and not isinstance(error, CheckpointError):
            raise
        report["odd"].append(str(error))
        try:
            with open_checkpoint(report["path"]) as checkpoint:
                read = read_tensors(checkpoint, format=reading.format)
                report["network"] = {
                    "format": read.table.name,
                    "describes": read.table.describes,
                    "under": read.root.path,
                }
                ignored, unexplained = read.ignored, read.unexplained
        except (CheckpointError, ConfigError):
            return
    reasons: dict[str, list[str]] = {}
    for key, why in ignored.items():
        reasons.setdefault(why, []).append(key)
    report["odd"] += [f"{why}: {some(keys, _SHOWN)}" for why, keys in reasons.items()]
    if unexplained:
        report["odd"].append(f"names that nothing here knows: {some(unexplained, _SHOWN)}")


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    files = f" in {report['files']} files" if report["files"] > 1 else ""
    yield "file", f"{report['path']}: {report['container']}, {report['bytes'] / 1e6:,.1f} MB{files}"
    network, adapter = report["network"], report["adapter"]
    if adapter is not None:
        yield "adapter", adapter["describes"]
        scale = "alpha / sqrt(r)" if adapter["rslora"] else "alpha / r"
        yield "scale", f"{scale}, alpha {adapter['alpha']:g}, r {adapter['rank']}"
        family = adapter["family"] or "a base network, whose family the names do not say"
        yield "family", f"{family}, names of {adapter['names'].replace('-', ' ').capitalize()}"
        revision = f", revision {adapter['revision']}" if adapter["revision"] else ""
        yield "base", f"{adapter['base'] or 'not named'}{revision}"
    if network is not None:
        under = f", under {network['under']!r}" if network["under"] else ""
        yield "format", f"{network['format']}: {network['describes']}{under}"
    if network is not None and "family" in network:
        yield "family", f"{network['family']}, head: {network['head'] or 'none'}"
        patch, image = network["patch"], network["image"]
        of_images = patch is not None
        sizes = f"{patch[0]} x {patch[1]}, image {image[0]} x {image[1]}" if of_images else ""
        yield (
            "sizes",
            f"{network['layers']} layers, width {network['width']}, {network['heads']} heads, MLP "
            f"width {network['mlp_width']}, "
            + (f"patches {sizes}, " if of_images else "texts of at most ")
            + f"{network['tokens']} tokens"
            + (f", {network['classes']} classes" if network["classes"] else ""),
        )
        resized = f", positions resized by {network['position_resize']}" if of_images else ""
        yield (
            "numerics",
            f"{network['activation']}, layer norm eps {network['layer_norm_eps']:g}{resized}",
        )
        if of_images:
            yield "images", network["preprocessing"] or "nothing says how they are prepared"
    yield "tensors", f"{len(report['tensors'])} of {', '.join(report['dtypes'])}"
    yield "parameters", f"{report['parameters']:,}"
    for text in report["odd"]:
        yield "odd", text
