"""What a run begins with: a model whose head fits the data, and what prepares its images."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError, MissingFileError, some, warn
from vit_common.families import DeiTConfig
from vit_common.images.predictions import default_image_processor, image_size
from vit_common.images.processor import BaseImageProcessor
from vit_common.presets import PRESETS, preset
from vit_common.recipes import Recipe
from vit_convert.source import find_processor
from vit_flax.auto import (
    FlaxAutoModelForImageClassification,
    FlaxAutoModelForMaskedImageModeling,
)
from vit_flax.families import FlaxDeiTForImageClassificationWithTeacher

HEADS = ("classifier", "cls_classifier", "distillation_classifier")
"""Parts of a model that its classes decide."""
_SHOWN = 3  # names in a message
_LOOKS = {
    "cls": "the class token",
    "mean": "the mean of the patches",
    "cls_mean": "the class token and the mean of the patches",
}


class Beginning(NamedTuple):
    """A model before training.

    Attributes:
        model: with parameters, of the file or drawn.
        processor: prepares images for it, as evaluation and prediction do.
    """

    model: Any
    processor: BaseImageProcessor


def begin(
    name: Any,
    recipe: Recipe,
    data: Any,
    *,
    seed: int = 0,
    dtype: Any = "float32",
    remat: str | None = None,
    scan_layers: bool = False,
    processor: BaseImageProcessor | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Beginning:
    """The model that a run trains.

    Args:
        name: folder, weights file, Hub name, or a model of this package; or the name of a size
            (`vit_common.presets`: "base", or "vit-base"), which is drawn from nothing.
        recipe: its task, image size, head, dropout and drop path decide.
        data: the training images; their classes decide the head.
        seed: of parameters that are drawn.
        dtype: compute dtype.
        remat: what a block keeps for its gradient (`enable_gradient_checkpointing`); None keeps
            everything.
        scan_layers: compile one block and run it for all.
        processor: prepares the images; None means the model's own.
        options: more of `from_pretrained`: fields of the configuration, options of the Hub.
        say: called with a line for each thing that was decided here: a new head, a model that is
            drawn from nothing.

    Raises:
        ViTError: there is no such model, or it does not fit the data.
    """
    options = dict(options or {})
    if recipe.image_size is not None:
        options["image_size"] = recipe.image_size
    if isinstance(name, (str, os.PathLike)):
        model, found = _named(name, recipe, data, seed, dtype, scan_layers, options, say)
        processor = processor or found
    else:
        model = name
        _check_head(model, recipe, data)
        _check_built(model.config, recipe, say)
    if remat is not None:
        model.enable_gradient_checkpointing(remat)
    processor = processor or default_image_processor(model.config)
    _check_patches(model.config)
    return Beginning(model, processor)


def _named(
    name: str | os.PathLike,
    recipe: Recipe,
    data: Any,
    seed: int,
    dtype: Any,
    scan_layers: bool,
    options: dict[str, Any],
    say: Callable[[str], object],
) -> tuple[Any, BaseImageProcessor | None]:
    made = {"seed": seed, "scan_layers": scan_layers}
    fields = _fields(recipe)
    size = _preset_name(name)
    if size is not None:
        return _drawn(size, recipe, data, dtype, made, {**options, **fields}, say), None
    auto: Any = FlaxAutoModelForImageClassification
    if recipe.task == "mim":
        auto = FlaxAutoModelForMaskedImageModeling
    try:
        source, loading = auto.open_pretrained(name, {**options, **fields, **made})
    except MissingFileError as error:
        raise MissingFileError(
            f"{error} (For new weights name a size: {', '.join(f'vit-{n}' for n in PRESETS)}.)"
        ) from error
    with source:
        found = find_processor(source)
        pooling = source.config.pooling
        if "pooling" not in options:
            _set_pooling(str(name), source.config, recipe, say)
        before = _names(source.config) if source.classifies else None
        if recipe.task == "mim":
            source.config.encoder_stride = source.config.patch_height_width[0]  # of a new decoder
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*newly initialized.*")
                model = auto.from_source(source, dtype=dtype, **loading)
            say(f"{name}: a new decoder and mask token are drawn; the network's weights are kept")
            processor = None if found is None else found[0]
            return model, _at_size(processor, source.config, options)
        _set_classes(source.config, data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, info = auto.from_source(
                source,
                dtype=dtype,
                **loading,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    for each in caught:
        if "newly initialized" not in str(each.message):
            warn(str(each.message), each.category)
    new = {*info["missing_keys"], *info["mismatched_keys"]}
    odd = sorted(key for key in new if not key.removeprefix("vit.").startswith(HEADS))
    if odd:
        raise InputError(f"{name}: these weights do not fit the model: {some(odd, _SHOWN)}.")
    after = _names(model.config)
    other = before is not None and before != after and not _unnamed(before)
    if new or other or model.config.pooling != pooling:
        _new_head(model, recipe)
        say(_head_line(str(name), before, after))
    processor = None if found is None else found[0]
    return model, _at_size(processor, model.config, options)


def is_size(name: Any) -> bool:
    """Whether a model's name is that of a size, whose weights are drawn."""
    return _preset_name(name) is not None


def _preset_name(name: str | os.PathLike) -> str | None:
    if not isinstance(name, str) or os.path.exists(name):
        return None
    short = name.removeprefix("vit-")
    return short if short in PRESETS else None


def _drawn(
    size: str,
    recipe: Recipe,
    data: Any,
    dtype: Any,
    made: Mapping[str, Any],
    fields: Mapping[str, Any],
    say: Callable[[str], object],
) -> Any:
    """A model of a size, from nothing."""
    config: ViTConfig = preset(size)
    table = {**config.to_dict(), **fields}
    table.pop("model_type", None)
    if recipe.task == "mim":
        table["encoder_stride"] = config.patch_height_width[0]
        config = ViTConfig.from_dict(table)
        model = FlaxAutoModelForMaskedImageModeling.from_config(config, dtype=dtype, **made)
    elif recipe.task == "distill" and recipe.distillation != "none":
        config = DeiTConfig.from_dict(table)
        _set_classes(config, data)
        model = FlaxDeiTForImageClassificationWithTeacher(config, dtype=dtype, **made)
    else:
        config = ViTConfig.from_dict(table)
        if "pooling" not in fields:
            _set_pooling(f"vit-{size}", config, recipe, say)
        _set_classes(config, data)
        model = FlaxAutoModelForImageClassification.from_config(config, dtype=dtype, **made)
        _new_head(model, recipe)
    say(f"vit-{size} is a size, not a trained model: its weights are drawn from --seed")
    return model


def _fields(recipe: Recipe) -> dict[str, Any]:
    """Fields of the configuration that a recipe sets."""
    given = {
        "hidden_dropout_prob": recipe.dropout,
        "drop_path_rate": recipe.drop_path,
    }
    return {name: value for name, value in given.items() if value is not None}


def _set_pooling(
    name: str, config: ViTConfig, recipe: Recipe, say: Callable[[str], object]
) -> None:
    """Let the new head look at what the recipe says. Where this network cannot, what the recipe
    has of itself is left out, and what a user set is refused."""
    pooling = recipe.pooling
    if recipe.task == "mim" or pooling == "" or pooling == config.pooling:
        return
    tried = copy.deepcopy(config)
    if "pooling" in config.fields:
        tried.pooling = pooling
        with contextlib.suppress(ConfigError):
            tried.validate()
            config.pooling = pooling
            return
    why = f"the classifier of this {config.model_type} looks at {_LOOKS[config.pooling]}"
    if not recipe.is_usual("pooling"):
        raise InputError(f"{name}: `pooling` cannot be {pooling!r}: {why}. Leave it out.")
    say(f"{name}: {why}; it stays so")


def _at_size(
    processor: BaseImageProcessor | None, config: ViTConfig, options: Mapping[str, Any]
) -> BaseImageProcessor | None:
    """The processor for the size of the images of this run."""
    if processor is None or "image_size" not in options:
        return processor
    from vit_common.images.sizes import processor_at_size

    new = config.image_height_width
    return processor_at_size(processor, image_size(config, processor), new)


# -- classes


def outputs_of(data: Any) -> int:
    """How many outputs a model of these data has: classes, or numbers."""
    if data.classes is not None:
        return len(data.classes)
    return 1 if data.labels.ndim == 1 else int(data.labels.shape[1])


def _names(config: ViTConfig) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def _unnamed(names: tuple[str, ...]) -> bool:
    """Whether these are no names, but what a configuration calls classes that have none."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def _set_classes(config: ViTConfig, data: Any) -> None:
    count = outputs_of(data)
    names = data.classes or [f"LABEL_{i}" for i in range(count)]
    config.num_labels = count
    config.id2label = dict(enumerate(map(str, names)))
    config.label2id = {str(name): i for i, name in enumerate(names)}
    config.problem_type = data.problem_type


def _head_line(name: str, before: tuple[str, ...] | None, after: tuple[str, ...]) -> str:
    many = f"{len(after)} outputs" if _unnamed(after) and len(after) > 1 else _counted(after)
    new = f"a new one for {many} is trained"
    if before is None:
        return f"{name}: has no classification head; {new}"
    if len(before) != len(after):
        return f"{name}: its head for {_counted(before)} is replaced; {new}"
    if before == after:  # a recipe with `pooling` makes its own
        return f"{name}: its head is replaced, since the recipe sets what a head looks at; {new}"
    pairs = [f"{b!r} is now {a!r}" for b, a in zip(before, after, strict=True) if a != b]
    if not pairs:
        return f"{name}: its head looks at something else than this one is to; {new}"
    return (
        f"{name}: its head is for as many classes, but others ({some(pairs, _SHOWN)}); it is "
        f"replaced, and {new}"
    )


def _counted(names: tuple[str, ...]) -> str:
    return "1 output" if len(names) == 1 else f"{len(names)} classes"


def _new_head(model: Any, recipe: Recipe) -> None:
    """Give a model a new head, as the recipe has it begin."""
    params = dict(model.network_params)
    heads = [head for head in HEADS if head in params]
    if recipe.head == "zero":
        fresh = {head: jax.tree.map(jnp.zeros_like, params[head]) for head in heads}
    else:
        fresh = model.init_weights(model.key, model.input_shape)
    params.update({head: fresh[head] for head in heads})
    model.params = params


def _check_head(model: Any, recipe: Recipe, data: Any) -> None:
    """Raise InputError if a model that was given does not fit the data."""
    if recipe.task == "mim":
        return
    wanted = outputs_of(data)
    if model.config.num_labels != wanted:
        raise InputError(
            f"the model has {model.config.num_labels} outputs, and the data {wanted}; give its "
            "name or folder instead, so that its head is replaced, or a model with "
            f"num_labels={wanted}."
        )
    if model.config.problem_type not in (None, data.problem_type):
        raise InputError(
            f"the model's problem_type is {model.config.problem_type!r}, and the data's "
            f"{data.problem_type!r}."
        )
    _set_classes(model.config, data)


def _check_built(config: ViTConfig, recipe: Recipe, say: Callable[[str], object]) -> None:
    """Settings of a recipe that a model which was given has decided already."""
    size = recipe.image_size
    built = {
        "image_size": config.image_height_width,
        "dropout": config.hidden_dropout_prob,
        "drop_path": config.drop_path_rate,
        "pooling": config.pooling,
    }
    wanted = {name: getattr(recipe, name) for name in built}
    wanted["image_size"] = (size, size) if isinstance(size, int) else size
    odd = [name for name in built if wanted[name] not in (None, "", built[name])]
    given = [name for name in odd if not recipe.is_usual(name)]
    if given:
        values = ", ".join(f"{name} {wanted[name]!r}, not {built[name]!r}" for name in given)
        raise InputError(
            f"the recipe wants {values} as the model was built; give the model's name or folder "
            "instead, or build it so."
        )
    if odd:
        say(f"the model was built already: {', '.join(odd)} of the recipe are left out")


def _check_patches(config: ViTConfig) -> None:
    (H, W), (h, w) = config.image_height_width, config.patch_height_width
    if H % h or W % w:
        down, up = (H // h * h, W // w * w), (-(-H // h) * h, -(-W // w) * w)
        raise ConfigError(
            f"images of {H} x {W} pixels do not divide into patches of {h} x {w}; wanted a "
            f"multiple, such as {down[0]} x {down[1]} or {up[0]} x {up[1]}."
        )
