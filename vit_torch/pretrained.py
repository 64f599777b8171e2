"""The models people import: modules with files in and out.

Constructors, calls and methods are those of Transformers 4.57.6 (`models/vit/modeling_vit.py`,
`modeling_utils.py`).
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from vit_common.config import ViTConfig, as_config
from vit_common.errors import InputError
from vit_common.files.containers.tensor import DTYPES, Tensor
from vit_common.parameters import parameter_shapes
from vit_convert.formats import table_for
from vit_convert.load import Loadable, is_finite, load_parameters, warn_if_not_finite
from vit_convert.save import Savable, SaveFormat
from vit_convert.source import Source
from vit_torch.attention import check_implementation
from vit_torch.base import ModelBase
from vit_torch.layers import fill
from vit_torch.model import (
    ViTForImageClassificationModule,
    ViTForMaskedImageModelingModule,
    ViTModule,
)

# Keywords of Transformers 4.57.6 -> the values that ask for what happens here anyway.
_ALWAYS_SO: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True),
    "weights_only": (None, True),
    "variant": (None,),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "quantization_config": (None,),
    "tp_plan": (None,),
    "_fast_init": (None, True, False),
}


DeviceMap = str | int | torch.device | Mapping[str, Any] | None


class ViTPreTrainedModel(Loadable, Savable, ModelBase):
    """Base of the models: `ModelBase`, with files in and out."""

    _preferred_files: ClassVar = (
        "from_flax",
        ("flax_model.msgpack", "flax_model.msgpack.index.json"),
    )
    _without_effect: ClassVar = _ALWAYS_SO

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take the names of Transformers' state dicts too, where a family has others there."""
        own = {name: value.ndim for name, value in self.state_dict().items()}
        given = {
            key.removeprefix(prefix): getattr(value, "ndim", None)
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        if any(own.get(key) != ndim for key, ndim in given.items()):
            table = table_for("hub", self.config, self.head)
            for bare, key in table.strip(given).items():
                found = None if own.get(key) == given[key] else table.rule_for_foreign(bare)
                if found is None or len(found[0].foreign_names) > 1:
                    continue
                rule, index = found
                if len(rule.canonical_names) > 1:  # one array for several, along its first axis
                    tensor = state_dict.pop(f"{prefix}{key}")
                    parts = tensor.chunk(len(rule.canonical_names))
                    start = prefix if bare == key else f"{prefix}{self.base_model_prefix}."
                    for name, part in zip(rule.canonical_names, parts, strict=True):
                        state_dict[f"{start}{name.replace('{i}', index or '')}"] = part
                    continue
                name = rule.canonical_names[0].replace("{i}", index or "")
                for ours in (name, f"{self.base_model_prefix}.{name}"):
                    if ours in own and ours not in given.keys() - {key}:
                        (tensor,) = rule.layout.to_canonical([state_dict.pop(f"{prefix}{key}")])
                        state_dict[f"{prefix}{ours}"] = tensor
                        break
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(
            self.config,
            self.head,
            add_pooling_layer=getattr(self, "add_pooling_layer", False),
            use_mask_token=getattr(self, "use_mask_token", False),
        )

    def _shapes(self) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        """Name -> shape of every tensor in this model's files, and the names among them that belong
        to parts of a subclass or to modules assigned to an attribute."""
        shapes = self._canonical_shapes()
        state = self.state_dict()
        if state.keys() == shapes.keys() and not self._is_customized():
            return shapes, frozenset()
        network, prefix = self.base_model, ""
        if network is not self:
            prefix = f"{self.base_model_prefix}."
        known = {f"{prefix}{name}" for name in parameter_shapes(self.config, None)}
        if isinstance(network, ViTPreTrainedModel):
            known |= {f"{prefix}{name}" for name in network._canonical_shapes()}
        known |= {n for n, tensor in state.items() if tuple(tensor.shape) == shapes.get(n)}
        own = frozenset(name for name in state if name not in known)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}, own

    @classmethod
    def _is_customized(cls) -> bool:
        """Whether this is a subclass written outside this package."""
        return not cls.__module__.startswith("vit_torch.")

    @classmethod
    def _constructor_keywords(cls) -> list[str]:
        names = super()._constructor_keywords()
        return [*names, *(["attn_implementation"] if "attn_implementation" not in names else [])]

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: ViTConfig | str | os.PathLike | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_missing: bool = False,
        ignore: Iterable[str] = (),
        output_loading_info: bool = False,
        device_map: DeviceMap = None,
        format: str | None = None,
        from_flax: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: directory, weights file (with `config.json` beside it
                or `config=`), or "owner/name" on the Hub; or an adapter folder of PEFT, which is
                merged into the base model that it names.
            *model_args: further positional arguments of the constructor.
            config: configuration, or where to read it, if not beside the weights.
            dtype, torch_dtype: dtype of the parameters, "auto" for the file's; None is float32.
            ignore_mismatched_sizes: draw parameters anew that have another shape in the file.
            allow_missing: draw parameters of the network anew that the file lacks; without it only
                those of a head may be missing.
            ignore: regular expressions of names in the file that may be left over. Without it,
                tensors of the network that the model has no place for are an error, and so is a
                trained head while one is drawn anew: see `vit_convert.leftovers`.
            output_loading_info: return `(model, info)`, `info` with the lists of names
                `missing_keys`, `unexpected_keys`, `mismatched_keys`, and with `error_msgs`.
            device_map: device to load onto: a name, number or `torch.device`; `{"": device}`; or
                "auto", the first GPU if there is one. None is torch's default device. A model is
                not split over several devices.
            format: the weights' format ("timm", "google", ...; see docs/convert.md), if it cannot
                be detected.
            from_flax: prefer weights in Flax's layout where there are both. (Both are read
                without it.)
            **kwargs: `adapter`, an adapter folder to merge into this model, whatever base model it
                names; options of the Hub (`revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`, `force_download`), fields of the config, arguments of the
                constructor. With another `image_size` than the checkpoint's, positions are
                resampled by its own rule.

        Warns:
            UserWarning: parameters are newly drawn or left aside, or hold NaN.

        Raises:
            MissingFileError: there is nothing of that name, or it cannot be reached.
            ConfigError: the configuration is not of this architecture.
            CheckpointError: the weights are corrupt, incomplete or do not fit.

        Example:
            >>> model = ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
            >>> model(pixel_values).logits.shape
        """
        options = {**kwargs, "config": config, "format": format, "from_flax": from_flax}
        source, loading = cls.open_pretrained(
            pretrained_model_name_or_path, options, wanted=cls.config_class
        )
        with source:
            return cls.from_source(
                source,
                *model_args,
                dtype=dtype,
                torch_dtype=torch_dtype,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                allow_missing=allow_missing,
                ignore=ignore,
                output_loading_info=output_loading_info,
                device_map=device_map,
                **loading,
            )

    @classmethod
    def from_source(
        cls,
        source: Source,
        *model_args: Any,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_missing: bool = False,
        ignore: Iterable[str] = (),
        output_loading_info: bool = False,
        device_map: DeviceMap = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model of an opened checkpoint, which stays open.

        Args:
            source: what `vit_convert.source.open_source` gives.
            *model_args, dtype, torch_dtype, ignore_mismatched_sizes, allow_missing, ignore,
                output_loading_info, device_map: as `from_pretrained`.
            **kwargs: arguments of the constructor, beside those that `source` holds.

        Returns, Warns, Raises: as `from_pretrained`.
        """
        wanted = parse_dtype(torch_dtype if dtype is None else dtype)
        device = parse_device(device_map)
        make: Any = cls
        arguments = {**source.left_over, **kwargs}
        config = as_config(source.config, cls.config_class)
        if "attn_implementation" in arguments:  # the constructor of a subclass need not take it
            config = copy.copy(config)
            config._attn_implementation = check_implementation(arguments.pop("attn_implementation"))
        elif not source.config_given and config._attn_implementation is None:
            config = copy.copy(config)  # it says what runs, as in Transformers
            config._attn_implementation = "sdpa"
        # A subclass may compute with what it builds, so that is built on a real device.
        place = contextlib.nullcontext() if cls._is_customized() else torch.device("meta")
        with place:
            model = make(config, *model_args, **arguments)
        shapes, own = model._shapes()
        loaded = load_parameters(
            source,
            shapes,
            own=own,
            model=cls.__name__,
            config=model.config,
            allow_missing=allow_missing,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            ignore=ignore,
        )
        if wanted is None:
            floating = (tensor for name, tensor in loaded.tensors.items() if name not in own)
            first = next(floating, None)
            wanted = torch.float32 if first is None else getattr(torch, first.dtype.name)
        state, not_finite = {}, []
        for name, tensor in loaded.tensors.items():
            array = tensor.read()
            if not is_finite(array):
                not_finite.append(name)
            value = to_torch(array).to(device)
            state[name] = value.to(wanted) if value.is_floating_point() else value
        warn_if_not_finite(source.path, not_finite)
        for name in loaded.missing:
            if name not in own:  # the constructor has drawn those
                state[name] = draw_parameter(name, shapes[name], model.config).to(device, wanted)
        model.load_state_dict(state, strict=not own, assign=True)
        model = (model.to(device, wanted) if own else model).eval()
        if device_map is not None:
            model.hf_device_map = {"": device}
        return (model, loaded.info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        to: SaveFormat | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and the weights into a directory; an earlier save survives a failure.

        Args:
            save_directory: made if it is not there.
            is_main_process: False does nothing: of several processes, one writes.
            state_dict: weights to write; None means the model's own.
            save_function, variant: accepted for Transformers' sake; without effect.
            push_to_hub: upload the directory too (`repo_id`, `commit_message`, `private`, ...).
            max_shard_size: largest file, in bytes or as "5GB".
            safe_serialization: must be True: pickles are read here but not written.
            token: of the Hub.
            to: the format by name: "hub" (default), "flax" or "flax-safetensors".

        Raises:
            MissingFileError: the directory or a file cannot be written.
            InputError: `state_dict` does not fit, or a bad option.
        """
        self._check_save_keywords(kwargs)
        if not is_main_process:
            return
        if not safe_serialization:
            raise InputError(
                "`safe_serialization=False` would write a pickle, which this project does not; "
                'leave it out to write model.safetensors, or pass `to="flax"`.'
            )
        state = dict(self.state_dict() if state_dict is None else state_dict)
        shapes, own = self._shapes()
        wrong = [name for name in shapes if name not in state]
        wrong += [name for name in state if name not in shapes]
        if wrong:
            raise InputError(f"`state_dict` lacks or has in excess: {', '.join(sorted(wrong))}.")
        wrong = [
            f"{name} must have shape {shape}; given {tuple(state[name].shape)}"
            for name, shape in shapes.items()
            if tuple(state[name].shape) != shape
        ]
        if wrong:
            raise InputError("`state_dict`: " + "; ".join(wrong) + ".")
        self._save(
            save_directory,
            {name: lazily(name, state[name]) for name in shapes},
            to=to or "hub",
            max_shard_size=max_shard_size,
            upload={**kwargs, "push_to_hub": push_to_hub, "token": token},
            own=own,
        )


class ViTModel(ViTPreTrainedModel, ViTModule):
    """The base network: hidden states, and a pooled output unless `add_pooling_layer=False`.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooler.
        use_mask_token: whether there is a mask token, for `bool_masked_pos`.
        attn_implementation: see `vit_torch.attention`.
    """

    def __init__(
        self,
        config: ViTConfig,
        add_pooling_layer: bool = True,
        use_mask_token: bool = False,
        *,
        attn_implementation: str = "auto",
    ):
        super().__init__(
            config,
            add_pooling_layer=add_pooling_layer,
            use_mask_token=use_mask_token,
            attn_implementation=attn_implementation,
        )


ViTPreTrainedModel.network_class = ViTModel


class ViTForImageClassification(ViTPreTrainedModel, ViTForImageClassificationModule):
    """The base network with a linear classifier on the class token.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    head = "classifier"

    def __init__(self, config: ViTConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)

    @property
    def num_labels(self) -> int:
        """Number K of classes."""
        return self.config.num_labels


class ViTForMaskedImageModeling(ViTPreTrainedModel, ViTForMaskedImageModelingModule):
    """The base network with a mask token and a decoder back to pixels.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    head = "decoder"

    def __init__(self, config: ViTConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)


def draw_parameter(name: str, shape: tuple[int, ...], config: ViTConfig) -> torch.Tensor:
    """A new parameter of a canonical name, as the constructors draw it."""
    parameter = torch.empty(shape)
    fill(parameter, name, config)
    return parameter


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype of an argument; None for "auto".

    Raises:
        InputError: it is not a floating dtype.
    """
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"`dtype` must be a floating torch dtype or 'auto'; given {dtype!r}.")
    return found


def parse_device(device_map: DeviceMap) -> torch.device:
    """The one device that a `device_map` of Transformers 4.57.6 means.

    Raises:
        InputError: it is no device, or means several.
    """
    wanted = device_map
    if isinstance(wanted, Mapping):
        if len({str(device) for device in wanted.values()}) != 1:
            raise InputError(
                "`device_map` must name one device, as a model is not split over several here; "
                f"given {device_map!r}. Pass a device such as 'cuda:0'."
            )
        (wanted, *_) = wanted.values()
    if wanted is None:
        return torch.get_default_device()
    if isinstance(wanted, str) and wanted in ("auto", "balanced", "balanced_low_0", "sequential"):
        wanted = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        if isinstance(wanted, bool) or (isinstance(wanted, int) and wanted < 0):
            raise TypeError
        return torch.device(f"cuda:{wanted}" if isinstance(wanted, int) else wanted)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            "`device_map` must be a device ('cpu', 'cuda:0', a number of a GPU), {'': device} or "
            f"'auto'; given {device_map!r}."
        ) from error


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A torch tensor from a checkpoint's array, copied only where needed.

    What a file reader gives is fresh memory unless it is marked read-only.
    """
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = np.array(array, order="C", copy=True)
    if array.dtype.name == "bfloat16":  # numpy's extension type, unknown to torch
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def lazily(name: str, tensor: torch.Tensor) -> Tensor:
    """A torch tensor as the converter's `Tensor`, converted when it is read."""
    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    return Tensor(name, tuple(tensor.shape), dtype, lambda: to_numpy(tensor))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array of the same bits; bfloat16 has the dtype of `ml_dtypes`."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
