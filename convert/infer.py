"""The configuration of weights that come without one: what their names and shapes say, and what
networks in that format have in common. Nothing is guessed: what neither says is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_common.config import ViTConfig
from vit_common.config_fields import ROWS, stem_stride
from vit_common.errors import CheckpointError, ConfigError
from vit_common.families import Dinov2Config, config_class
from vit_common.images.imagenet import imagenet_labels
from vit_common.parameters import DIFFERENTIAL
from vit_common.positions import resize_positions
from vit_common.presets import PRESETS
from vit_convert.formats import FORMATS
from vit_convert.formats.format import Format, Published
from vit_convert.formats.timm.config import (
    LABELS,
    POOLING,
    heads_of,
    label_names,
    pooling_of,
    read_timm_config,
)
from vit_convert.rules import Mapped, TensorLike

IMAGENET_CLASSES = 1000
_PRESETS = PRESETS.items()

PUBLISHED: tuple[Published, ...] = (
    *(Published(f"ViT-{name}", w, d, inner, heads) for name, (w, d, heads, inner, _) in _PRESETS),
    # Alabdulmohsin et al. 2023, arXiv:2305.13035; Oquab et al. 2023, arXiv:2304.07193; Zhai et al.
    # 2022, arXiv:2106.04560.
    Published("ViT-So400m", 1152, 27, 4304, 16),
    Published("DINOv2 ViT-giant", 1536, 40, 4096, 24, gated=True),
    # Siméoni et al. 2025, arXiv:2508.10104, and what timm 1.0.31 has of such sizes.
    Published("DINOv3 ViT-H+", 1280, 32, 5120, 20, gated=True),
    Published("ViT-G", 1664, 48, 8192, 16),
    # Of these names in timm 1.0.31; no weights of the second were published.
    Published("vit_base_patch16_siglip_gap_224", 768, 12, 3072, 12, class_token=False),
    Published("vit_base_patch16_gap_224", 768, 12, 3072, 16, class_token=False),
    *dict.fromkeys(row for table in FORMATS for row in table.published),
)
"""Published networks whose files do not say their number of heads; the presets' sources are there.

Without a class token only those are listed that share all sizes: other networks of such sizes may
have any number of heads."""


@dataclass(frozen=True)
class Note:
    """One thing that was set: which field, to what, and what says so."""

    field: str
    value: Any
    origin: str


def infer_config(
    table: Format,
    mapped: Mapped,
    source: Mapping[str, TensorLike],
    timm: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ViTConfig, list[Note]]:
    """The configuration that weights in a foreign format imply, and where each field is from.

    Args:
        table: their format.
        mapped: the weights under their canonical names.
        source: the weights as the file has them.
        timm: timm's own `config.json`, if there is one beside them.
        overrides: fields that the caller knows better.

    Raises:
        CheckpointError: blocks are missing, or a size is not in the weights; the message says which
            option gives it.
        ConfigError: timm's file has a keyword that changes the network and is not understood.
    """
    shapes = {name: tensor.shape for name, tensor in mapped.tensors.items()}
    odd = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) != _rank(name)]
    if odd:
        raise CheckpointError(f"tensors of an impossible number of axes: {', '.join(odd[:60])}.")
    fields: dict[str, tuple[Any, str]] = {}
    given = _checked(table, overrides)

    def note(origin: str, **values: Any) -> None:
        fields.update({name: (value, origin) for name, value in values.items()})

    family = table.families[0]
    for name, value in table.settings.items():
        note(f"the format {table.name}", **{name: value})
    _sizes(shapes, family, note)
    if _STEM in shapes:
        _stem(shapes, note)
        note(f"the format {table.name}", **table.stem)
    if timm is not None:
        read_timm_config(timm, shapes, note)
    if table.says is not None:
        note("constants in the file", **table.says(source))
    if "num_attention_heads" not in {*given, *fields}:
        _heads(shapes, source, mapped, timm, note)
    _pooling(shapes, family, timm, note)
    known = {name: value for name, (value, _) in fields.items()} | given
    _image_size(table, shapes, known, given, family, note)
    for name in () if table.unsaid is None else table.unsaid(shapes):
        if name not in known:
            raise CheckpointError(
                f"`{name}` is not in these weights, and networks of such names differ in it; give "
                f"it: `--set {name}=...` of the command, `{name}=` in Python, or a config.json "
                "beside the file."
            )
    labels = known.get("num_labels")
    if not {"id2label", "num_labels"} & set(given):
        names = label_names(timm)
        if names is not None and len(names) == labels:
            note(LABELS, id2label=dict(enumerate(names)))
            fields.pop("num_labels")
        elif labels == IMAGENET_CLASSES and (table.imagenet or timm is not None):
            note(
                "ImageNet-1k, for a head of 1000 classes",
                id2label=dict(enumerate(imagenet_labels())),
            )
            fields.pop("num_labels")
    cls = config_class(family)
    values = {name: value for name, (value, _) in fields.items()} | given
    if "id2label" in given or "label2id" in given:
        values.pop("num_labels", None)
    accepted = {*cls.fields, "num_labels"}
    _check_family(cls, fields)
    try:
        config = cls(**{name: value for name, value in values.items() if name in accepted})
    except ConfigError as error:
        raise ConfigError(f"{error} (read from the weights in {table.name} format)") from error
    refused = [name for name in given if name not in accepted]
    if refused:
        raise ConfigError(
            f"config: {cls.__name__} has no field {', '.join(map(repr, refused))}; wanted some of "
            f"{', '.join(cls.fields)}."
        )
    notes = [
        Note(name, value, origin)
        for name, (value, origin) in fields.items()
        if name not in given and name in accepted
    ]
    notes += [Note(name, value, "given") for name, value in given.items()]
    return config, notes


def _check_family(cls: type[ViTConfig], fields: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse what is said of a network that its family cannot be."""
    neutral = {"norm_type": "layernorm", "block_type": "pre_norm"}
    for name, (value, origin) in fields.items():
        if name in cls.fields or name == "num_labels":
            continue
        fixed = getattr(cls, name, ROWS[name].default if name in ROWS else neutral.get(name))
        if value != fixed and (value or fixed):
            raise ConfigError(
                f"{origin} means `{name}={value!r}`, which no {cls.__name__[:-6]} here can have."
            )


def _rank(name: str) -> int:
    """Number of axes of a parameter."""
    if name in ("visual_projection.weight", "text_projection.weight"):
        return 2
    if name.endswith(("projection.weight", "decoder.0.weight")):
        return 4
    if name == "encoder.rope_frequencies":
        return 4
    if name.endswith((".in_bias", ".out_bias", *DIFFERENTIAL)):
        return 1
    if name == "logit_scale":
        return 0
    if name.startswith("embeddings.stem."):
        return 1 if name.endswith(".bias") or "norm" in name.split(".")[-2] else 4
    if (name.startswith("embeddings.") and "projection" not in name) or name == "pooler.probe":
        return 3
    vector = name.endswith((".bias", "lambda_1", "lambda_2")) or "norm" in name.split(".")[-2]
    return 1 if vector else 2


def _checked(table: Format, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's fields, checked as the configuration will check them."""
    checks = config_class(table.families[-1]).fields | config_class(table.families[0]).fields
    return {
        name: checks[name][1](name, value) if name in checks and value is not None else value
        for name, value in (overrides or {}).items()
    }


def _sizes(shapes: Mapping[str, tuple[int, ...]], family: str, note: Any) -> None:
    D, C, *patch = shapes["embeddings.patch_embeddings.projection.weight"]
    side: Any = patch[0] if patch[0] == patch[1] else tuple(patch)
    layers = sorted(
        {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layer.")}
    )
    if layers != list(range(len(layers))):
        absent = sorted(set(range(layers[-1])) - set(layers))
        raise CheckpointError(
            f"blocks {', '.join(map(str, absent[:12]))} are missing; the last one is {layers[-1]}."
        )
    note("shapes", hidden_size=D, num_channels=C, patch_size=side, num_hidden_layers=len(layers))
    first = shapes.get("encoder.layer.0.intermediate.dense.weight")
    second = shapes.get("encoder.layer.0.output.dense.weight")
    if first and second:
        swiglu = first[0] == 2 * second[1]
        if family == "dinov3_vit":
            note("shapes", intermediate_size=second[1], use_gated_mlp=swiglu)
        elif family.startswith("dinov2"):
            ratio = _mlp_ratio(D, second[1], swiglu)
            note("shapes", mlp_ratio=ratio, use_swiglu_ffn=swiglu)
        else:
            note("shapes", intermediate_size=second[1])
            if swiglu:
                note("shapes", use_swiglu_ffn=True)
    scale = "encoder.layer.0.lambda_1" in shapes
    if family == "beit":
        note("shapes", layer_scale_init_value=0.1 if scale else 0.0)
        note(
            "names",
            use_mask_token="embeddings.mask_token" in shapes,
            use_absolute_position_embeddings="embeddings.position_embeddings" in shapes,
            use_relative_position_bias=any("attention.relative_position" in n for n in shapes),
            use_shared_relative_position_bias=any(
                n.startswith("encoder.relative_position") for n in shapes
            ),
        )
    elif family == "dinov3_vit":
        pass  # always has both
    elif family.startswith("dinov2"):
        note("names", use_mask_token="embeddings.mask_token" in shapes)
    elif scale:
        note("names", layer_scale_init_value=1e-5)
    registers = shapes.get("embeddings.register_tokens")
    if registers:
        note("shapes", num_register_tokens=registers[1])
    if family == "vit":
        note("names", **_structure(shapes))
    if family == "dinov3_vit":
        block = "encoder.layer.0."
        biases = {f"{n}_bias": f"attention.attention.{n}" for n in ("query", "key", "value")}
        biases |= {"proj_bias": "attention.output.dense", "mlp_bias": "output.dense"}
        note("names", **{n: f"{block}{at}.bias" in shapes for n, at in biases.items()})
    elif family != "beit" and layers:
        name = "encoder.layer.0.attention.attention.query.bias"
        note("names", qkv_bias=name in shapes)
    for name in ("classifier.weight", "cls_classifier.weight"):
        if name in shapes:
            note("shapes", num_labels=shapes[name][0])
    if "lm_head.weight" in shapes:
        note("shapes", vocab_size=shapes["lm_head.weight"][0])
    if "pooler.dense.weight" in shapes:
        note("shapes", pooler_output_size=shapes["pooler.dense.weight"][0])
        if "classifier.weight" in shapes:
            note("names (pre-logits)", use_representation_layer=True)


_STEM = "embeddings.stem.convolution.weight"


def _stem(shapes: Mapping[str, tuple[int, ...]], note: Any) -> None:
    """The ResNet before the patch projection."""
    blocks = {
        (int(match[1]), int(match[2]))
        for name in shapes
        if (match := re.match(r"embeddings\.stem\.stage(\d)\.(\d+)\.", name))
    }
    depths = tuple(sum(i == stage for i, _ in blocks) for stage in range(len(dict(blocks))))
    if blocks != {(i, j) for i, depth in enumerate(depths) for j in range(depth)}:
        raise CheckpointError("blocks of the stem are missing.")
    width, C = shapes[_STEM][:2]
    second = "embeddings.stem.convolution2.weight" in shapes
    normed = "embeddings.stem.norm.weight" in shapes
    kind = ("mbconv" if normed else "convolutions") if second else "resnetv2"
    if "embeddings.stem.convolution3.weight" in shapes:
        kind = "resnetd"
    note("names", stem_type=kind)
    if kind == "resnetd":  # its first convolution has half the channels of its third
        width *= 2
    note("shapes", stem_depths=depths, stem_width=width, num_channels=C)
    _, _, *size = shapes["embeddings.patch_embeddings.projection.weight"]
    if kind == "mbconv":  # its kernel is one pixel larger than its stride
        size = [side - 1 for side in size]
    height, width = (side * stem_stride(depths, kind) for side in size)
    note("shapes", patch_size=_sides(height, width))


def _structure(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What only a ViT may have or lack, as far as names show it. A norm or a bias that is not there
    may just be missing, so what has none of them is said by a configuration alone."""
    layer, fields = "encoder.layer.0", dict[str, Any]()
    if f"{layer}.attention.attention.differential.norm.weight" in shapes:
        fields["attention_type"] = "differential"
    for field, module in (
        ("use_relative_position_bias", f"{layer}.attention.attention"),
        ("use_shared_relative_position_bias", "encoder"),
    ):
        if found := shapes.get(f"{module}.relative_position_bias.in_kernel"):
            fields |= {field: True, "relative_position_type": "mlp"}
            fields["relative_position_width"] = found[1]
            if "embeddings.position_embeddings" not in shapes:
                fields["use_absolute_position_embeddings"] = False
    if "embeddings.cls_token" not in shapes:
        fields["use_cls_token"] = False
    for field, name in (
        ("use_pre_norm", "pre_layernorm.weight"),
        ("use_qk_norm", f"{layer}.attention.attention.query_norm.weight"),
        ("use_attention_norm", f"{layer}.attention.output.layernorm.weight"),
        ("use_mlp_norm", f"{layer}.output.layernorm.weight"),
        ("use_mlp_input_norm", f"{layer}.intermediate.layernorm.weight"),
    ):
        if name in shapes:
            fields[field] = True
    if "use_pre_norm" in fields and "embeddings.patch_embeddings.projection.bias" not in shapes:
        fields["use_patch_bias"] = False
    has_bias = {
        part: any(name.endswith(f".attention.attention.{part}.bias") for name in shapes)
        for part in ("query", "key")
    }
    if has_bias["query"] and not has_bias["key"]:
        fields["use_key_bias"] = False
    if f"{layer}.layernorm_before.weight" in shapes and not any(
        ".layernorm_after." in name for name in shapes
    ):
        fields["block_type"] = "parallel"
    branches = {name.split(".")[4] for name in shapes if name.startswith(f"{layer}.branch.")}
    if branches:
        fields["num_parallel_branches"] = 1 + len(branches)
    return fields


def _mlp_ratio(width: int, inner: int, swiglu: bool) -> float:
    """The `mlp_ratio` from which `Dinov2Config` derives that width of the MLP."""
    exact = (1.5 * inner if swiglu else inner) / width
    for ratio in (4, int(exact), exact, math.nextafter(exact, math.inf)):
        made = Dinov2Config(hidden_size=width, num_attention_heads=1, use_swiglu_ffn=swiglu)
        if ratio > 0:
            made.mlp_ratio = ratio
            if made.intermediate_size == inner:
                return ratio
    raise CheckpointError(f"no `mlp_ratio` gives an MLP of width {inner} for a width of {width}.")


def _heads(shapes, source, mapped, timm, note) -> None:
    for name, tensor in source.items():
        if name.endswith(("query/kernel", "query_dense/vars/0")) and len(tensor.shape) == 3:
            note("shapes", num_attention_heads=tensor.shape[1])
            return
    table = next((s for n, s in shapes.items() if n.endswith("relative_position_bias_table")), None)
    table = table or next((s for n, s in shapes.items() if n.endswith(".out_kernel")), None)
    if table:
        note("shapes", num_attention_heads=table[1])
        return
    width = shapes["embeddings.patch_embeddings.projection.weight"][0]
    norm = shapes.get("encoder.layer.0.attention.attention.query_norm.weight")
    if norm and norm[0] and width % norm[0] == 0:
        note("shapes", num_attention_heads=width // norm[0])
        return
    if named := heads_of(timm):
        note(named[1], num_attention_heads=named[0])
        return
    second = shapes.get("encoder.layer.0.output.dense.weight", (0, 0))
    depth = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layer.")})
    gated = shapes.get("encoder.layer.0.intermediate.dense.weight", (0,))[0] == 2 * second[1]
    sizes = (width, depth, second[1], gated)
    class_token = "embeddings.cls_token" in shapes
    rows = [row for row in PUBLISHED if (row.width, row.depth, row.inner, row.gated) == sizes]
    rows = [row for row in rows if row.class_token == class_token]
    chosen = _by_positions(rows, mapped)
    if len({row.heads for row in chosen}) == 1:
        (row, *_) = chosen
        note(
            f"the published model of width {width}, depth {depth}"
            + (f", positions as in {row.name}" if len({r.heads for r in rows}) > 1 else ""),
            num_attention_heads=row.heads,
        )
        return
    ask = (
        "`--heads` of the command, `num_attention_heads=` in Python, or a config.json beside the "
        "file"
    )
    if chosen:
        twins = " and ".join(f"{row.name} ({row.heads} heads)" for row in chosen)
        raise CheckpointError(
            "the number of attention heads is not in these weights, and published models of these "
            f"sizes differ in it: {twins}. Say which it is: {ask}."
        )
    raise CheckpointError(
        "the number of attention heads is not in these weights, and no published model known here "
        f"has a width of {width}, {depth} blocks, MLPs of {second[1]} "
        f"and {'a' if class_token else 'no'} class token; give it: {ask}."
    )


_NEAR, _FAR = 0.3, 0.8
_TRAINED = (14, 14)


def _by_positions(rows: list[Published], mapped: Mapped) -> list[Published]:
    """Those of several published networks that the positions in a file do not rule out: a network
    with fixed positions is ruled out if they are far from these, and the only one if they are near.

    Fine-tuning may move positions a little; learned ones are about as far from fixed ones as these
    are from zero.
    """
    if len({row.heads for row in rows}) < 2 or not any(row.positions for row in rows):
        return rows
    tensor = mapped.tensors.get("embeddings.position_embeddings")
    side = 0 if tensor is None else math.isqrt(tensor.shape[1])
    if tensor is None or side * side not in (tensor.shape[1], tensor.shape[1] - 1):
        return rows
    given = _centred(np.asarray(tensor.read(), np.float64)[0, -side * side :])
    left, near = [], []
    for row in rows:
        if row.positions is None:
            left.append(row)
            continue
        distance = min(
            float(np.linalg.norm(given - fixed) / np.linalg.norm(fixed))
            for fixed in map(_centred, _at_size(row, (side, side)))
        )
        if distance < _NEAR:
            near.append(row)
        elif not distance > _FAR:
            left.append(row)
    return near or left


def _centred(positions: np.ndarray) -> np.ndarray:
    """Without the mean of each channel, which fixed positions of different kinds share."""
    return positions - positions.mean(axis=0)


def _at_size(row: Published, grid: tuple[int, int]) -> list[np.ndarray]:
    """Fixed positions for a grid: computed there, and resampled from the one of 224 pixels."""
    assert row.positions is not None
    made = row.positions(grid, row.width).astype(np.float64)
    if grid == _TRAINED:
        return [made]
    at_224 = row.positions(_TRAINED, row.width).astype(np.float64)[None]
    return [made, resize_positions(at_224, _TRAINED, grid, "bicubic", 0)[0]]


def _pooling(shapes, family: str, timm: Any, note: Any) -> None:
    if family == "beit":
        pretrained = "lm_head.weight" in shapes
        note("names", use_mean_pooling="pooler.layernorm.weight" in shapes or pretrained)
        return
    if family != "vit":
        return
    if "pooler.probe" in shapes:
        note("names (attention pooling)", pooling="map")
        inner = shapes.get("pooler.intermediate.dense.weight", (None,))[0]
        if inner != shapes.get("encoder.layer.0.output.dense.weight", (0, inner))[1]:
            note("shapes", pooler_intermediate_size=inner)
        return
    if "pooler.layernorm.weight" in shapes:
        note("names (fc_norm)", pooling="mean", norm_after_pooling=True)
        return
    if (pool := pooling_of(timm)) in ("avg", "map"):
        note(POOLING, pooling="mean" if pool == "avg" else "map")
    if "embeddings.cls_token" not in shapes:
        note("names (no class token)", pooling="mean")


def _image_size(table: Format, shapes, known, given, family: str, note: Any) -> None:
    patch = known["patch_size"]
    height, width = patch if isinstance(patch, tuple) else (patch, patch)
    positions = shapes.get("embeddings.position_embeddings")
    if positions is None:
        if table.positions is not None and known.get("use_cls_token", True):
            note("no positions in the file", position_tokens="patches")
        if "image_size" not in known and table.image_size is not None:
            note(f"published networks ({table.describes})", image_size=table.image_size)
        elif "image_size" not in known:
            relative = next(
                (s for n, s in shapes.items() if n.endswith("relative_position_bias_table")), None
            )
            side = 0 if relative is None else (math.isqrt(max(relative[0] - 3, 0)) + 1) // 2
            if relative is None or (2 * side - 1) ** 2 + 3 != relative[0]:
                raise CheckpointError(_ask_for_size("these weights have no positions"))
            note("shapes", image_size=_sides(side * height, side * width))
        return
    rows = positions[1]
    registers = known.get("num_register_tokens", 0) if family == "vit" else 0
    cls = int(known.get("use_cls_token", True))
    prefix = {"deit": 2}.get(family, cls + registers)
    # All tokens in front with positions, only the class token, or none: whichever fits the size
    # that is known, or else leaves a square; consecutive squares are too far apart for two to fit.
    options = {"all": prefix, "cls": cls, "patches": 0} if family == "vit" else {"all": prefix}
    size = known.get("image_size")
    h, w = size if isinstance(size, (tuple, list)) else (size, size)
    for by_size in (True, False) if size is not None else (False,):
        for where, count in options.items():
            side = math.isqrt(max(rows - count, 0))
            if by_size:
                fits = (h // height) * (w // width) == rows - count
            else:
                fits = side > 0 and side * side == rows - count and "image_size" not in given
            if fits:
                if count != prefix:
                    note("shapes", position_tokens=where)
                if not by_size:
                    note("shapes", image_size=_sides(side * height, side * width))
                return
    if "image_size" in given:
        raise CheckpointError(
            f"{rows} positions do not fit an image of {h} x {w} pixels (height x width) with "
            f"patches of {patch}. Give the size these weights were trained at; to run at "
            "another, first convert them with `vit convert --set image_size=... --image-size ...`."
        )
    raise CheckpointError(
        _ask_for_size(f"{rows} positions do not make a square image with patches of {patch}")
    )


def _sides(height: int, width: int) -> Any:
    return height if height == width else (height, width)


def _ask_for_size(why: str) -> str:
    return (
        f"the image size is not in these weights ({why}); give it: `--set "
        "image_size=[height,width]` of the command, `image_size=` in Python, or a config.json "
        "beside the file."
    )
