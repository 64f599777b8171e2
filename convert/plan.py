"""What a conversion is to write, and where: the target's format, files, tensors, configuration and
report. Longer than most modules here, because all of it is decided before anything is written."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.config import CONFIG_NAME, FLOATS, ViTConfig
from vit_common.errors import CheckpointError, ConfigError, ExistingFileError, InputError
from vit_common.files.containers.tensor import DTYPES, Tensor
from vit_common.images.processor import PROCESSOR_NAME, BaseImageProcessor
from vit_common.images.sizes import processor_at_size
from vit_common.images.usual import USUAL
from vit_common.parameters import class_name, parameter_shapes
from vit_convert.formats import DEFAULT, FILES, check_format, table_for
from vit_convert.infer import Note, infer_config
from vit_convert.leftovers import ATTENTION_POOLING, check_patterns, is_ignored
from vit_convert.read import resample
from vit_convert.report import Report
from vit_convert.rules import Mapped, TensorLike, to_foreign, unprefixed
from vit_convert.source import Source

SUFFIXES = {files.suffix: name for name, files in FILES.items() if files.suffix}
"""Suffix of a target that is one file -> what is written if no format is named."""

PICKLES = (".pth", ".pt", ".bin")


def is_file(target: Path) -> bool:
    """Whether a target is meant as one file, by its suffix."""
    return target.suffix in (*SUFFIXES, *PICKLES) and not os.path.isdir(target)


def target_format(target: Path, to: str | None) -> str:
    """The format to write: the one asked for, or else what the target says.

    Raises:
        InputError: there is no such format to write, or the suffix does not decide it.
    """
    if to is not None:
        check_format(to)
        return FILES[to].for_suffix.get(target.suffix, to)
    if not is_file(target):
        return DEFAULT
    if target.suffix in PICKLES:
        raise InputError(
            f"{target}: say which format to write with `to` (`--to` of the command); a "
            f"{target.suffix} file can hold several."
        )
    return SUFFIXES[target.suffix]


def refuse_to_overwrite(paths: Iterable[Path], stale: Iterable[Path]) -> None:
    """Raise ExistingFileError if one of the files to write, or of older weights, is there."""
    there = [str(path) for path in paths if os.path.exists(path)]
    older = [str(path) for path in stale if str(path) not in there]
    if older and not there:
        raise ExistingFileError(
            f"{', '.join(older)}: weights of another format, which would be read instead of the "
            "new ones or beside them; nothing was written. Choose another folder, or pass --force "
            "(in Python `force=True`) to replace them."
        )
    if there:
        raise ExistingFileError(
            f"{', '.join(there)}: already there; nothing was written. Pass --force (in Python "
            "`force=True`) to overwrite."
        )


def stale_weights(directory: Path) -> list[Path]:
    """Weights of an earlier save in a directory, which could be read beside the new ones."""
    pattern = re.compile(
        r"(model|flax_model|pytorch_model)(-\d{5,}-of-\d{5,})?"
        r"\.(safetensors|msgpack|bin|npz|pth)(\.index\.json)?"
    )
    if not os.path.isdir(directory):
        return []
    return [file for file in sorted(directory.iterdir()) if pattern.fullmatch(file.name)]


class Plan:
    """What is to be written: the canonical tensors of the target, and its names for them."""

    def __init__(
        self,
        source: Source,
        to: str,
        dtype: str | None,
        image_size: Any,
        ignore: tuple[str, ...],
        num_labels: int | None,
        labels: Sequence[str] | None,
    ) -> None:
        self.source, self.to = source, to
        self.head = source.head
        self.notes = list(source.notes)
        self.ignored = dict(source.ignored)
        self.config = type(source.config).from_dict(source.config.to_dict())
        self._set_labels(num_labels, labels)
        unexplained = self._ignore(ignore)
        tensors = self._account(unexplained)
        if image_size is not None:
            tensors = self._resample(tensors, image_size)
        if dtype is not None:
            tensors = {n: _cast(n, t, DTYPES[dtype]) for n, t in tensors.items()}
        self.tensors = tensors
        dtypes = dict.fromkeys(t.dtype.name for t in tensors.values())
        self.dtype = dtype or max(dtypes, key=lambda name: DTYPES[name].itemsize)
        self.config.dtype = self.dtype
        self.architecture = class_name(self.config, self.head)
        self.config.architectures = [self.architecture]
        self.table = table_for(to, self.config, self.head)
        self._refuse_what_readers_drop()
        self.written = self._foreign(tensors)

    def _refuse_what_readers_drop(self) -> None:
        """Raise InputError if the format's own library would drop part of this network."""
        why = self.table.cannot_hold and self.table.cannot_hold(self.config)
        joined = self.head == "classifier" and self.config.pooling == "cls_mean"
        if joined and self.config.base_family == "vit" and not self.table.prefixed:
            why = "its classifier looks at the class token and the mean of the patches together"
        if self.config.base_family == "vit" and not (self.table.prefixed or self.table.structured):
            why = why or _unlike_vit(self.config)
        if why:
            raise InputError(f"the format {self.to!r} cannot hold this network: {why}.")

    # -- the source's side

    def _set_labels(self, num_labels: int | None, labels: Sequence[str] | None) -> None:
        if num_labels is None and labels is None:
            return
        weights = self.source.mapped.tensors
        name = "cls_classifier.weight" if self.head == "teacher" else "classifier.weight"
        if name not in weights:
            raise InputError("labels were given, but these weights have no classifier.")
        rows = weights[name].shape[0]
        count = len(labels) if labels is not None else num_labels
        if count != rows or (num_labels is not None and num_labels != rows):
            raise InputError(
                f"the classifier has {rows} classes; given {count} labels"
                + (f" and `num_labels` {num_labels}." if None not in (labels, num_labels) else ".")
            )
        if labels is not None:
            self.config.id2label = dict(enumerate(map(str, labels)))
        elif len(self.config.id2label) == rows:
            return  # they have names
        else:
            self.config.id2label = {i: f"LABEL_{i}" for i in range(rows)}
        self.config.label2id = {label: i for i, label in self.config.id2label.items()}
        self.notes = [note for note in self.notes if note.field not in ("id2label", "num_labels")]
        self.notes.append(Note("id2label", self.config.id2label, "given"))

    def _ignore(self, patterns: tuple[str, ...]) -> list[str]:
        """The unexplained names that are left when those the caller gave up are ignored."""
        left = []
        patterns = check_patterns(patterns)
        self.given_up = lambda name: is_ignored(patterns, name, *self.source.names_in_file(name))
        for name in self.source.unexplained:
            if self.given_up(name):
                self.ignored[name] = "given up by the caller"
            else:
                left.append(name)
        return left

    def _account(self, unexplained: list[str]) -> dict[str, TensorLike]:
        """The tensors of the network, each once; all others are ignored or refused."""
        found: dict[str, TensorLike] = dict(self.source.mapped.tensors)
        if self.config.num_hidden_layers > len(found):  # a file can claim any number
            raise CheckpointError(
                f"the configuration says {self.config.num_hidden_layers} blocks, and the file "
                f"holds {len(found)} tensors in all."
            )
        pooled = any(name.startswith("pooler.") for name in found)
        shapes = {
            unprefixed(name): shape
            for name, shape in parameter_shapes(
                self.config,
                self.head,
                add_pooling_layer=pooled,
                use_mask_token="embeddings.mask_token" in found,
            ).items()
        }
        parts = self.source.parts
        faults = [
            f"{name}: nothing here knows this name"
            + (f" (part of {parts[name]}, which no model here has)" if name in parts else "")
            for name in unexplained
        ]
        for name, tensor in found.items():
            if tensor.dtype.name not in FLOATS:
                faults.append(
                    f"{name}: its dtype is {tensor.dtype}; wanted one of {', '.join(FLOATS)}"
                )
            if name not in shapes:
                why = self._why_left(name)
                if why is None:
                    faults.append(f"{name}: the configuration has no such parameter")
                else:
                    self.ignored[name] = why
            elif tuple(tensor.shape) != tuple(shapes[name]):
                faults.append(
                    f"{name}: its shape is {tuple(tensor.shape)}; by the configuration it must be "
                    f"{tuple(shapes[name])}"
                )
        missing = [name for name in shapes if name not in found]
        faults += [f"{name}: missing" for name in missing]
        if faults:
            shown = ";\n".join(f"- {fault}" for fault in faults[:60])
            more = f";\n- and {len(faults) - 60} more" if len(faults) > 60 else ""
            raise CheckpointError(
                f"not every tensor fits a network of the family {self.config.model_type!r} in the "
                f"format {self.source.table.name!r} ({self.source.table.describes}); "
                f"{len(faults)} fault{'s' * (len(faults) > 1)}:\n{shown}{more}.\n"
                "Nothing was written. Name what may be left out with `--ignore PATTERN` (in Python "
                "`ignore=`)."
            )
        return {name: found[name] for name in shapes}

    def _why_left(self, name: str) -> str | None:
        if name == "embeddings.mask_token":
            return "a mask token, which a model with this head does not have"
        by_attention = name.startswith(ATTENTION_POOLING)
        if by_attention and self.config.pooler_type != "map":
            return "given up by the caller" if self.given_up(name) else None
        if name.startswith("pooler.") and self.head is not None:
            return "a pooler, which the head of this model does not look at"
        heads = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")
        if name.startswith(heads) and self.head is not None:
            return "a second head"
        return "given up by the caller" if self.given_up(name) else None

    # -- changes

    def _resample(self, tensors: dict[str, TensorLike], size: Any) -> dict[str, TensorLike]:
        trained = copy.deepcopy(self.config)
        self.config.image_size = size
        self.config.validate()
        resampled, how = resample(tensors, self.source.table, trained, self.config)
        self.notes = [note for note in self.notes if note.field != "image_size"]
        said = "; ".join(filter(None, ("given", how)))
        self.notes.append(Note("image_size", self.config.image_size, said))
        return {**tensors, **resampled}

    # -- the target's side

    def _foreign(self, tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
        prefix = f"{self.config.base_model_prefix}." if self.head is not None else ""
        top = {unprefixed(n): n for n in parameter_shapes(self.config, self.head)}
        named = {top.get(name, prefix + name): tensor for name, tensor in tensors.items()}
        mapped = to_foreign(named, self.table)
        if mapped.unused:
            raise InputError(
                f"the format {self.to!r} ({self.table.describes}) cannot hold "
                f"{len(mapped.unused)} of these tensors: {', '.join(sorted(mapped.unused)[:12])}."
            )
        return {self.table.root + name: tensor for name, tensor in mapped.tensors.items()}

    def names(self, target: Path, beside: Mapping[str, str]) -> list[Path]:
        """The files that would be written, shards aside."""
        if is_file(target):
            return [target]
        files = self.table.files
        suffix = {"torch": "pth"}.get(files.container, files.container)
        weights = f"{files.stem}.{suffix}"
        return [target / name for name in (weights, f"{weights}.index.json", *beside)]

    def _usual(self) -> dict[str, Any]:
        """What a reader of the weights alone takes for granted: field -> value."""
        table, config = self.table, self.config
        usual = dict(table.settings)
        if table.files.described or table.structured:
            return usual
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        unsaid = () if table.unsaid is None else table.unsaid(shapes)
        row = config.fields.get("hidden_act")  # a network of two towers has none of its own
        if row is not None and "hidden_act" not in unsaid and not config.use_swiglu_ffn:
            usual.setdefault("hidden_act", row.default)
        # Names say attention pooling, and a norm of the mean; the mean of patches beside a class
        # token they do not.
        named = config.pooling == "map" or config.norm_after_pooling or not config.use_cls_token
        if not named and config.base_family == "vit" and self.head == "classifier":
            usual.setdefault("pooling", "cls")
        return usual

    def _close(self, implied: Mapping[str, Any]) -> bool:
        """Whether these settings change the outputs by no more than a rounding or a resampling."""
        gelus = ("gelu", "gelu_new", "gelu_pytorch_tanh")
        exact = implied.get("hidden_act", "gelu") in gelus and self.config.hidden_act in gelus
        return "pooling" not in implied and (exact or "hidden_act" not in implied)

    def report(self, target: Path, dry_run: bool) -> Report:
        source = self.source
        implied = {
            field: value
            for field, value in self._usual().items()
            if getattr(self.config, field) != value
        }
        warnings = []
        if implied:
            warnings.append(
                f"networks in the format {self.to!r} have "
                + ", ".join(f"{name}={value!r}" for name, value in implied.items())
                + "; this one has "
                + ", ".join(f"{name}={getattr(self.config, name)!r}" for name in implied)
                + ". Loading these weights without this configuration gives "
                + ("slightly different outputs." if self._close(implied) else "other outputs.")
            )
        if self.table.loses is not None:
            warnings += self.table.loses(self.config, source.timm is not None)
        if is_file(target) and target.suffix != ".safetensors":
            needs = self.table.files.described
            warnings.append(
                f"a {target.suffix} file cannot hold the configuration: "
                + (
                    "it needs a config.json beside it to be read"
                    if needs
                    else "it is inferred from the weights when the file is read"
                )
                + ". Give a folder as the target to have one written."
            )
        warnings += self._differences(target)
        found = source.mapped.tensors
        return Report(
            source=str(source.path),
            target=str(target),
            format_from=source.table.name,
            format_to=self.to,
            describes=source.table.describes,
            family=self.config.model_type,
            architecture=self.architecture,
            tensors_read=len(source.checkpoint) - len(self.ignored),
            tensors_written=len(self.written),
            parameters=sum(math.prod(t.shape) for t in self.tensors.values()),
            bytes=sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values()),
            dtype=self.dtype,
            dry_run=dry_run,
            set=self.notes,
            ignored={
                # By the file's own names where a canonical one was given up.
                name: why
                for name, why in self.ignored.items()
                if name in source.checkpoint or name in found
            },
            left_out=dict(source.checkpoint.left_out),
            warnings=warnings,
        )

    def _differences(self, target: Path) -> list[str]:
        """Fields of the configuration that readers of the files alone would get wrong."""
        said = []
        given = {note.field for note in self.notes}
        odd = {
            field: value
            for field, value in self.source.table.settings.items()
            if getattr(self.config, field) != value and field not in given
        }
        if odd and not [note for note in self.source.notes if note.field != "adapter"]:
            said.append(
                f"networks in the format {self.source.table.name!r} have "
                + ", ".join(f"{name}={value!r}" for name, value in odd.items())
                + "; the configuration beside the source says "
                + ", ".join(f"{name}={getattr(self.config, name)!r}" for name in odd)
                + ", and was believed."
            )
        if is_file(target) and target.suffix != ".safetensors" and not self.table.files.described:
            try:
                mapped = Mapped(dict(self.tensors), [])  # type: ignore[arg-type]
                guess, _ = infer_config(self.table, mapped, self.written)
            except (CheckpointError, ConfigError) as error:
                return [*said, f"loading the file alone needs options: {error}"]
            fields = [
                name
                for name in self.config.fields
                if name not in ("id2label", "label2id", "architectures", "dtype")
                and not name.endswith(("_dropout_prob", "drop_path_rate", "initializer_range"))
                and getattr(guess, name, None) != getattr(self.config, name)
            ]
            if fields:
                said.append(
                    "loading the file alone infers "
                    + ", ".join(f"{name}={getattr(guess, name, None)!r}" for name in fields)
                    + "; it is "
                    + ", ".join(f"{name}={getattr(self.config, name)!r}" for name in fields)
                    + "."
                )
        return said

    def beside(
        self, target: Path, processor: tuple[BaseImageProcessor, str] | None, report: Report
    ) -> dict[str, str]:
        """The small files of a directory: name -> text. What images need, and no file says, is
        said in the report."""
        found, origin = processor or (None, "")
        if found is not None and self.config.grid_size != self.source.config.grid_size:
            old, new = (each.image_height_width for each in (self.source.config, self.config))
            found = processor_at_size(found, old, new)
        if is_file(target):
            report.warnings += self._preprocessing_lost(target, found, origin)
            return {}
        beside = {CONFIG_NAME: self.config.to_json_string()}
        if self.table.files.config is not None:
            beside[CONFIG_NAME] = self.table.files.config(self.config, self.source.timm, found)
        if found is not None:
            beside[PROCESSOR_NAME] = found.to_json_string()
            report.preprocessing = origin
        elif not self.config.is_text and self.config.num_channels == 3:
            report.warnings.append(
                "nothing in the source says how images are prepared, so no "
                f"{PROCESSOR_NAME} is written, and commands will use mean and deviation 0.5. "
                + _ASK_FOR_PREPROCESSING
            )
        return beside

    def _preprocessing_lost(
        self, target: Path, found: BaseImageProcessor | None, origin: str
    ) -> list[str]:
        """What the readers of one file do not know of images, if they would do anything else."""
        if found is None:
            return []
        implied = self.table.preprocessing and self.table.preprocessing(self.config)
        if implied and _pixels(implied[0]) == _pixels(found):
            return []
        return [
            f"a {target.suffix} file cannot hold the image preprocessing ({origin}): put a "
            f"{PROCESSOR_NAME} beside it, or give a folder as the target."
        ]


_ASK_FOR_PREPROCESSING = (
    "Give it with `--preprocessing` (in Python `preprocessing=`): a preprocessor_config.json, a "
    f"model that has one, or one of {', '.join(USUAL)}."
)


def _pixels(processor: BaseImageProcessor) -> dict[str, Any]:
    """What of a processor decides pixels."""
    names = ("image_processor_type", "processor_class", "feature_extractor_type")
    return {name: value for name, value in processor.to_dict().items() if name not in names}


def _cast(name: str, tensor: TensorLike, dtype: np.dtype) -> TensorLike:
    if tensor.dtype == dtype:
        return tensor

    def load() -> np.ndarray:
        array = tensor.read()
        with np.errstate(over="ignore"):
            out = array.astype(dtype)
        if dtype == np.float16 and np.isinf(out).any() and not np.isinf(array).any():
            largest = np.abs(array.astype(np.float32)).max()
            raise CheckpointError(
                f"{name}: holds {largest:.4g}, more than float16 can (65504); use bfloat16."
            )
        return out

    return Tensor(name, tuple(tensor.shape), dtype, load)


def _unlike_vit(config: ViTConfig) -> str | None:
    """What makes a network another than a plain ViT though its parameters have the same names, or
    are fewer; None for a plain one."""
    if config.has_layer_scale and not config.use_mlp_layer_scale:
        return "its MLPs have no factors (`use_mlp_layer_scale` is False)"
    if config.use_swiglu_ffn and config.gate_act != "silu":
        return f"its MLPs have another gate (`gate_act` is {config.gate_act!r})"
    if config.rope_type:
        return "its queries and keys are rotated by their positions (`rope_type`)"
    if config.pool_prefix_tokens:
        return "its classifier looks at all tokens (`pool_prefix_tokens`)"
    if config.block_type != "pre_norm":
        return f"its blocks are of another kind (`block_type` is {config.block_type!r})"
    if config.norm_type != "layernorm":
        return f"its norms are of another kind (`norm_type` is {config.norm_type!r})"
    if not config.use_final_norm:
        return "it has no norm after the last block (`use_final_norm` is False)"
    if not config.use_patch_bias:
        return "its patches have no bias (`use_patch_bias` is False)"
    return None
