"""A checkpoint that was found, opened and understood: names, family, configuration, preprocessing.

What `from_pretrained`, `convert` and `vit inspect` have in common. No weight is read yet.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_common.config import CONFIG_NAME, OURS, ViTConfig, as_config, is_timm
from vit_common.errors import CheckpointError, ConfigError, MissingFileError, some
from vit_common.families import CONFIG_CLASSES, AutoConfig, config_class
from vit_common.files.checkpoint import Checkpoint, open_checkpoint
from vit_common.files.hub import AbsentFileError, ModelFiles, find_file
from vit_common.files.texts import parse_json, read_json
from vit_common.images.auto import AutoImageProcessor
from vit_common.images.processor import PROCESSOR_NAME, BaseImageProcessor
from vit_common.images.sizes import processor_at_size
from vit_common.images.timm import processor_from_timm
from vit_common.log import logger
from vit_common.parameters import Head
from vit_convert.adapters import (
    Adapter,
    classes_of,
    has_adapter,
    is_adapter,
    merged,
    read_adapter,
)
from vit_convert.detect import Root
from vit_convert.formats.format import family_prefix, fill
from vit_convert.formats.keras_hub import is_keras
from vit_convert.formats.timm.config import TRANSFORM
from vit_convert.infer import Note, infer_config
from vit_convert.read import Read, check_divides, fits_grid, read_tensors, resample
from vit_convert.rules import Format, Mapped, as_mapped

METADATA_KEY = "vit_config"
"""Key of the metadata of a safetensors file under which it carries its configuration."""


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        path: the weights file or its index.
        checkpoint: the tensors under the names of the file, still in it.
        table: the format's table.
        root: where in the file the network lies.
        mapped: the tensors under canonical names, without the prefix of a model with a head.
        ignored: name in the file -> why it is left aside.
        unexplained: names in the file that are not known here.
        parts: some of those -> what in the network they belong to, which no model here has.
        classifier: the tensors that were taken for it, and why, where their names do not say it.
        config: what the network is.
        notes: what was set that no configuration said, and what says it.
        timm: timm's own `config.json`, if there was one.
        described: whether a file beside the weights says all of the configuration.
        files: the other files of the model.
        given: fields of the configuration that the caller set.
        config_given: whether the caller gave the configuration as an object.
        left_over: keywords of the caller that are no fields of the configuration.
        trained: the configuration at the image size of the file, where the caller asked for
            another: positions in `mapped` are resampled then.
        adapter: the adapter that is merged into `mapped`; None where there is none.
        adapter_files: its files; those of the base model are `files`.
    """

    path: Path
    checkpoint: Checkpoint
    table: Format
    root: Root
    mapped: Mapped
    ignored: dict[str, str]
    unexplained: list[str]
    config: ViTConfig
    files: ModelFiles
    parts: Mapping[str, str] = field(default_factory=dict)
    classifier: str = ""
    notes: list[Note] = field(default_factory=list)
    timm: Mapping[str, Any] | None = None
    described: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    config_given: bool = False
    left_over: Mapping[str, Any] = field(default_factory=dict)
    trained: ViTConfig | None = None
    adapter: Adapter | None = None
    adapter_files: ModelFiles | None = None

    @property
    def classifies(self) -> bool:
        """Whether this file has a classifier, or a distilled DeiT's two."""
        return self.head in ("classifier", "teacher")

    @property
    def head(self) -> Head | None:
        """The head in this file; None for a base network."""
        found = self.mapped.tensors
        if "cls_classifier.weight" in found and "distillation_classifier.weight" in found:
            return "teacher"
        heads: dict[str, Head] = {
            "classifier.weight": "classifier",
            "decoder.0.weight": "decoder",
            "lm_head.weight": "tokens",
        }
        head = next((heads[name] for name in heads if name in found), None)
        if head is not None or not self.config.is_part:
            return head
        # CLIP's or SigLIP's: a tower that is left aside is not what the configuration is of.
        if self.config.sub_configs:
            projects = "projection_dim" in self.config.fields
            beside = "visual_projection.weight" if projects else "logit_scale"
            both = {"text_model.final_layernorm.weight", beside} <= found.keys()
            return "towers" if both else None
        own = "text" if self.config.is_text else "visual"
        return "projection" if f"{own}_projection.weight" in found else None

    @property
    def prefix(self) -> str:
        """What stands before every name of the network in the file ("", "model.vit.", ...)."""
        path, table = self.root.path, self.table
        first = self.names_in_file("embeddings.patch_embeddings.projection.weight")[:1]
        bare = [name.removeprefix(path) for name in first]
        return path + (family_prefix(bare, table.separator) if table.prefixed else "")

    def names_in_file(self, canonical: str) -> list[str]:
        """What the file calls a parameter, by its canonical name; several if it is fused."""
        rule = self.table.rule_for_canonical(canonical)
        if rule is None:
            return []
        wanted = {fill(name, rule[1]) for name in rule[0].foreign_names}
        bare = self.table.strip(self.root.keys)  # as the table has them -> without the root
        return [self.root.keys[bare[name]] for name in wanted if name in bare]

    def close(self) -> None:
        """Close the file; tensors not read by now cannot be read any more."""
        self.checkpoint.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_config_file(name_or_path: str | os.PathLike, **hub: Any) -> dict[str, Any] | None:
    """The `config.json` of a model as it is, or None where there is none.

    Raises:
        MissingFileError: it cannot be reached. ConfigError, CheckpointError: it is not JSON.
    """
    path = ModelFiles(name_or_path, **hub).find(CONFIG_NAME)
    return None if path is None else read_json(path)


def config_from_dict(table: Mapping[str, Any], **overrides: Any) -> Any:
    """The configuration of a Hub `config.json`, of whichever family it is; of ViT where it names
    none.

    Raises:
        ConfigError: as `AutoConfig.from_dict`.
    """
    if table.get("model_type") in (None, ""):
        table = {**table, "model_type": ViTConfig.model_type}
    family = table.get("model_type", "")
    if not isinstance(family, str | None):
        raise ConfigError(f"config: `model_type` must be a string; given {family!r}.")
    return AutoConfig.from_dict(table, **overrides)


Accept = Callable[[ViTConfig, Mapping[str, Any]], object]
"""Called with a configuration as soon as it is settled, and with the keywords that are no fields of
it; raises where either is refused."""


def refuse_left_over(config: ViTConfig, left_over: Mapping[str, Any]) -> None:
    """Raise ConfigError if there are keywords that are no fields of the configuration."""
    if left_over:
        raise ConfigError(
            f"config: {type(config).__name__} has no field "
            f"{', '.join(map(repr, left_over))}; wanted some of {', '.join(config.fields)}."
        )


def open_source(
    name_or_path: str | os.PathLike | ModelFiles,
    *,
    format: str | None = None,
    config: Any = None,
    overrides: Mapping[str, Any] | None = None,
    wanted: type[ViTConfig] | None = None,
    prefer: tuple[str, ...] | None = None,
    accept: Accept = refuse_left_over,
    fetch: bool = True,
    adapter: str | os.PathLike | ModelFiles | None = None,
    **hub: Any,
) -> Source:
    """Find, open and understand a checkpoint, or a LoRA adapter with its base model.

    The configuration is settled before the weights are looked for, so what it refuses costs no
    download: from `config`, or `config.json`, or a safetensors file's header; and where none of
    them says what the network is, from the weights.

    Args:
        name_or_path: directory, weights file, index of shards, or "owner/name"; or an adapter
            folder of PEFT, whose base model is then opened, with the adapter merged.
        format: the weights' format, if it cannot be detected.
        config: the configuration, or where to read it, if not from beside the weights.
        overrides: fields of the configuration that the caller knows better, mixed with other
            keywords; all of them are other keywords where `config` is an object. Positions are
            resampled to an `image_size` that is not that of the weights.
        wanted: class of the configuration; None takes any family's.
        prefer: names of weights files to look for before the others.
        accept: called with the configuration and with the other keywords, before weights are
            fetched where that is possible.
        fetch: False takes only weights that are on this machine already.
        adapter: adapter folder to merge, or "owner/name[@revision]"; `name_or_path` is then its
            base model, whatever the adapter names.
        **hub: options of the Hub.

    Returns:
        The source, to be closed by the caller.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is corrupt, of no format known here, or of several.
        ConfigError: its configuration is refused.
        InputError: the patch does not divide the `image_size` to resample to.

    Example:
        >>> with open_source("google/vit-base-patch16-224") as source:
        ...     print(source.config.hidden_size, source.head)
    """
    files = name_or_path if isinstance(name_or_path, ModelFiles) else None
    files = ModelFiles(name_or_path, **hub) if files is None else files  # type: ignore[arg-type]
    options = {
        "format": format,
        "overrides": overrides,
        "wanted": wanted,
        "prefer": prefer,
        "accept": accept,
        "fetch": fetch,
    }
    if adapter is not None:
        if not isinstance(adapter, ModelFiles):
            adapter = ModelFiles(adapter, **_without(hub, "revision", "subfolder"))
        return _open_adapted(adapter, files, config, options)
    said_by, place = files.find(CONFIG_NAME), str(files.name)
    if is_adapter(files, described=said_by is not None):
        return _open_adapted(files, None, config, options)
    asked, given = config, dict(overrides or {})
    found = None if said_by is None else read_json(said_by)
    timm = found if is_timm(found) else None
    keras = found if is_keras(found) else None
    table = _without_timm(None if keras else found)
    described = table is not None
    if isinstance(config, (str, os.PathLike)):
        said_by, place = find_file(config, CONFIG_NAME, **files.hub), str(config)
        found, config = read_json(said_by), None
        timm = found if is_timm(found) else timm
        table = _without_timm(found)
    settled, trained, left_over = None, None, dict(given)
    if config is not None:
        settled = as_config(config, wanted or config_class(getattr(config, "model_type", "vit")))
        accept(settled, left_over)
    elif table is not None:
        assert said_by is not None
        settled, left_over = _settle(table, said_by, place, given, wanted, accept)
        trained = _trained(table, said_by, place, given, wanted, settled)
    try:
        path = files.weights(prefer, fetch=fetch)
    except MissingFileError:
        if files.local is None and fetch and has_adapter(files):
            return _open_adapted(files, None, asked, options)
        raise
    checkpoint = open_checkpoint(path)
    try:
        if settled is None and METADATA_KEY in checkpoint.metadata:
            table = parse_json(checkpoint.metadata[METADATA_KEY].encode(), path, "configuration")
            settled, left_over = _settle(table, path, place, given, wanted, accept)
            trained = _trained(table, path, place, given, wanted, settled)
        hints = {"suffix": path.suffix}
        if settled is not None:
            hints["model_type"] = settled.base_family
        if timm is not None:
            hints["architecture"] = str(timm["architecture"])
        read = read_tensors(checkpoint, format=format, hints=hints)
        notes = [Note(name, given[name], "given") for name in given if name not in left_over]
        if settled is None:
            if read.table.files.described:
                try:
                    files.need(CONFIG_NAME)
                except AbsentFileError as error:
                    raise AbsentFileError(
                        f"{error} Pass `config=` with the configuration of these weights: tools "
                        "such as Transformers' `Trainer` save none."
                    ) from error
                raise CheckpointError("there is no config.json, which this format needs.")
            known = {name for cls in CONFIG_CLASSES.values() for name in cls.fields}
            left_over = {n: v for n, v in given.items() if n not in known and n != "num_labels"}
            given = {name: value for name, value in given.items() if name not in left_over}
            said = _of_keras(keras, given)
            settled, notes, trained = _inferred(read, timm, {**said, **given})
            object.__setattr__(settled, "_name_or_path", place)
            settled = settled if wanted is None else _named(place, as_config, settled, wanted)
            accept(settled, left_over)
        elif (
            read.labels
            and config is None
            and not {"id2label", "num_labels"} & {*(table or {}), *given}
        ):
            settled.num_labels = read.labels
        if trained is not None and not fits_grid(read.mapped.tensors, trained):
            trained = None  # the size that is given is right, and the file's wrong
        if trained is not None and trained.grid_size != settled.grid_size:
            notes = [note for note in notes if note.field != "image_size"]
            notes += _resample(read, trained, settled)
        read.complete(settled)
        notes += read.notes
    except (CheckpointError, ConfigError) as error:
        checkpoint.close()
        if str(path) in str(error) or str(files.name) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except BaseException:
        checkpoint.close()
        raise
    logger.debug(
        "opened %s: format %s, family %s, %d tensors",
        *(path, read.table.name, settled.model_type, len(read.mapped.tensors)),
    )
    return Source(
        path=path,
        checkpoint=checkpoint,
        table=read.table,
        root=read.root,
        mapped=read.mapped,
        ignored=read.ignored,
        unexplained=read.unexplained,
        parts=read.parts,
        classifier=read.classifier,
        config=settled,
        files=files,
        notes=notes,
        timm=timm,
        described=described,
        given={name: value for name, value in given.items() if name not in left_over},
        config_given=config is not None,
        left_over=left_over,
        trained=trained,
    )


def _open_adapted(
    files: ModelFiles, base: ModelFiles | None, config: Any, options: Mapping[str, Any]
) -> Source:
    """An adapter's base model, with the adapter merged.

    Args:
        files: of the adapter.
        base: of the base model; None is the one that the adapter names.
        config: as in `open_source`; None is the base model's own, with the classes and the image
            size that a `config.json` in the adapter's folder says.
        options: more of `open_source`.
    """
    if files.local is not None and files.local.is_file():
        files = ModelFiles(files.local.parent)
    adapter = read_adapter(files)
    place = str(files.name)
    if base is None:
        base = _base_files(files, adapter)
    overrides = dict(options["overrides"] or {})
    if config is None and (path := files.find(CONFIG_NAME)) is not None:
        overrides = {**_of_adapter(read_json(path), overrides), **overrides}
    try:
        source = open_source(base, config=config, **{**options, "overrides": overrides})
    except MissingFileError as error:
        raise type(error)(
            f"the base model of the adapter {place}: {error} Name another place of it with --base "
            "(in Python `from_pretrained(base, adapter=...)`)."
        ) from error
    try:
        if source.adapter is not None:
            raise CheckpointError(
                f"{place}: its base model {base.name} is an adapter itself; merge that first "
                "(`vit convert`)."
            )
        source.mapped.tensors = merged(adapter, source.mapped.tensors, source.config)
        count = classes_of(adapter)
        if count is not None:
            source.classifier = ""
            if not {"id2label", "num_labels"} & source.given.keys() and not source.config_given:
                source.config.num_labels = count
    except BaseException:
        source.close()
        raise
    source.adapter, source.adapter_files = adapter, files
    source.notes.append(Note("adapter", adapter.describe(), place))
    return source


def _of_adapter(table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` beside an adapter says of the adapter: the classes, and the size of the
    images. A caller who gives other classes has all of them from himself."""
    names = ["image_size", "problem_type"]
    if not {"num_labels", "id2label", "label2id"} & given.keys():
        names += ["id2label", "label2id"]
    return {name: table[name] for name in names if table.get(name) is not None}


def _base_files(files: ModelFiles, adapter: Adapter) -> ModelFiles:
    """The files of the base model that an adapter names."""
    name, settings = adapter.settings.base, adapter.settings
    if name is None:
        raise ConfigError(
            f"{files.name}: its adapter_config.json names no base model. Name it with --base (in "
            "Python `from_pretrained(base, adapter=...)`)."
        )
    local = files.local
    if local is not None and not os.path.exists(name) and not os.path.isabs(name):
        beside = (local if local.is_dir() else local.parent) / name
        if beside.exists():
            name = str(beside)
    hub = _without(files.hub, "revision", "subfolder")
    try:
        return ModelFiles(name, revision=settings.revision, **hub)
    except MissingFileError as error:
        raise type(error)(
            f"the base model of the adapter {files.name}: {error} Name another place of it with "
            "--base (in Python `from_pretrained(base, adapter=...)`)."
        ) from error


def _without(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def _without_timm(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """The whole configuration in a `config.json`; None where there is none: timm's own file has
    room for a part, and holds the whole only where a conversion put it."""
    if not is_timm(table):
        return table
    whole = (table or {}).get(OURS)
    return dict(whole) if isinstance(whole, Mapping) else None


def _of_keras(table: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What Keras's `config.json` says that the weights do not; nothing where there is none."""
    said = (table or {}).get("config")
    said = said if isinstance(said, Mapping) else {}
    names = {"layer_norm_epsilon": "layer_norm_eps"}
    fields = {ours: said[theirs] for theirs, ours in names.items() if theirs in said}
    shape = said.get("image_shape")
    if isinstance(shape, (list, tuple)) and len(shape) == 3 and "image_size" not in given:
        channels_last = shape[2] in (1, 3, 4)
        height, width = shape[:2] if channels_last else shape[1:]
        fields["image_size"] = height if height == width else [height, width]
    return fields


def _settle(
    table: Mapping[str, Any],
    path: Path,
    place: str,
    given: Mapping[str, Any],
    wanted: type[ViTConfig] | None,
    accept: Accept,
) -> tuple[ViTConfig, dict[str, Any]]:
    """The configuration in a table, and the keywords that are no fields of it."""
    table = {**table, "_name_or_path": place}
    config, left_over = _named(path, config_from_dict, table, return_unused_kwargs=True, **given)
    if "attn_implementation" in given:  # an argument of the models too
        left_over["attn_implementation"] = given["attn_implementation"]
    if wanted is not None:
        config = _named(place, as_config, config, wanted)
    accept(config, left_over)
    return config, left_over


def _trained(
    table: Mapping[str, Any],
    path: Path,
    place: str,
    given: Mapping[str, Any],
    wanted: type[ViTConfig] | None,
    settled: ViTConfig,
) -> ViTConfig | None:
    """The configuration in a table with all that the caller gave but an image size; None where he
    gave none."""
    if given.get("image_size") is None:
        return None
    others = {name: value for name, value in given.items() if name != "image_size"}
    trained, _ = _settle(table, path, place, others, wanted, lambda *_: None)
    if trained.image_height_width != settled.image_height_width:
        check_divides(settled)  # before weights are fetched
    return trained


def _resample(read: Read, trained: ViTConfig, config: ViTConfig) -> list[Note]:
    """Resample positions from one grid to another's, and say so."""
    found = read.mapped.tensors
    resampled, how = resample(found, read.table, trained, config)
    found.update({name: as_mapped(tensor) for name, tensor in resampled.items()})
    return [Note("image_size", config.image_size, "; ".join(filter(None, ("given", how))))]


def _inferred(
    read: Read, timm: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> tuple[ViTConfig, list[Note], ViTConfig | None]:
    """The configuration that the weights imply, what says so, and the same at the weights' own
    image size where the caller asked for another."""

    def infer(fields: Mapping[str, Any]) -> tuple[ViTConfig, list[Note]]:
        return infer_config(read.table, read.mapped, read.tensors, timm, fields)

    def fits(fields: Mapping[str, Any]) -> bool:
        with contextlib.suppress(CheckpointError, ConfigError):
            return fits_grid(read.mapped.tensors, infer(fields)[0])
        return False

    others = {name: value for name, value in given.items() if name != "image_size"}
    try:
        if given.get("image_size") is None or not fits(others):
            return *infer(given), None
        trained, notes = infer(others)
        # Shapes alone leave it open whether 16 patches are 4 x 4 or 2 x 8.
        says = [note.origin for note in notes if note.field == "image_size"]
        if says == ["shapes"] and fits(given):
            return *infer(given), None
        config = copy.deepcopy(trained)
        config.image_size = given["image_size"]
        config.validate()
    except (CheckpointError, ConfigError) as error:
        if not read.unexplained:
            raise
        names = some(read.unexplained, 60)
        raise type(error)(f"{error} Names in the file that are not known here: {names}.") from error
    if config.image_height_width != trained.image_height_width:
        check_divides(config)
    notes = [note for note in notes if note.field != "image_size"]
    return config, [*notes, Note("image_size", config.image_size, "given")], trained


def _named(where: str | Path, build: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return build(*args, **kwargs)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def find_processor(source: Source) -> tuple[BaseImageProcessor, str] | None:
    """What prepares images for a source, and what says so; None where nothing does.

    In this order: `preprocessor_config.json`, an adapter's before its base model's; timm's
    `pretrained_cfg`; what networks of the source's format were trained on. Where the source was
    opened at another `image_size` than the file's, images are prepared in the same way for that
    size.

    Raises:
        ConfigError: the file is refused. MissingFileError: it cannot be reached.
    """
    if source.config.is_text:
        return None
    size = source.config.image_height_width
    trained = size if source.trained is None else source.trained.image_height_width
    places = (source.adapter_files, source.files)
    files = (place.find(PROCESSOR_NAME) for place in places if place is not None)
    path = next((path for path in files if path is not None), None)
    if path is not None:
        found = AutoImageProcessor.from_pretrained(path)
        return _at_size(source, found), PROCESSOR_NAME
    own = (source.timm or {}).get("pretrained_cfg")
    # Without a mean it says nothing about images: a conversion that knew nothing wrote it.
    if isinstance(own, Mapping) and "mean" in own:
        timms = {**own, "input_size": [source.config.num_channels, *size]}
        try:
            if trained != size and size[0] == size[1]:  # with timm's own rounding
                return processor_from_timm(timms), TRANSFORM
            return _at_size(source, processor_from_timm(own)), TRANSFORM
        except ConfigError:
            # What timm does and no processor here can do leaves the images to the caller.
            return implied_processor(source)
    return implied_processor(source)


def _at_size(source: Source, processor: BaseImageProcessor) -> BaseImageProcessor:
    """A processor of the file's image size as one of the source's."""
    if source.trained is None:
        return processor
    old, new = source.trained.image_height_width, source.config.image_height_width
    return processor_at_size(processor, old, new)


def implied_processor(source: Source) -> tuple[BaseImageProcessor, str] | None:
    """What networks of a source's format were trained on, and what says so."""
    implied = source.table.preprocessing
    if implied is None or source.config.num_channels != 3:
        return None
    found = implied(source.config if source.trained is None else source.trained)
    return None if found is None else (_at_size(source, found[0]), found[1])
