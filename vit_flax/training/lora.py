"""Low-rank adapters (LoRA): a tree of A and B beside a model's parameters, merged inside the step.

The model is not changed: W + (alpha / r) B A is computed from both trees, and the network runs on
the result, so every kernel of attention, scan, rematerialization and mesh works as without. In
files the adapters are PEFT's (`vit_convert.adapters`).

Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA); Liu et al.
2024, arXiv:2402.09353 (DoRA); initial values as `tuners/lora/layer.py` of PEFT 0.21.2.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.errors import CheckpointError, InputError, some
from vit_common.parameters import HEAD_PARAMETERS, Head, class_name
from vit_convert.adapters import (
    Adapter,
    LoraSettings,
    LowRank,
    layer_names,
    plain_table,
    read_adapter,
    write_adapter,
)
from vit_convert.rules import unprefixed
from vit_flax.params import canonical as canonical_tensors
from vit_flax.stacked import STACKED, stack_layers, unstack_layers

Params = Mapping[str, Any]
Path = tuple[str, ...]

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
MODEL, LORA = "model", "lora"
"""The two trees of a state: the model's parameters, and the adapters."""

MLP = "mlp"
"""The target that stands for both layers of each MLP."""

_CONVOLUTION = 4  # axes of a kernel
_MLP_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.(?:intermediate|output)\.dense\.weight$")


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        name: canonical name in files, with its prefix and without ".weight".
        path: of the layer in the model's tree, without "kernel".
        shape: of the kernel: (in, out), or (h, w, in, out) of a convolution.
        rank: r.
        alpha: the scale is alpha / r, or alpha / sqrt(r).
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    rank: int
    alpha: float


@dataclass(frozen=True)
class Lora:
    """Which layers of a model have adapters, and how these become parameters of the model.

    The arrays themselves are in a tree {"model": parameters, "lora": adapters}, which `init` makes
    and a training state holds. In it a dense kernel (in, out) has `lora_A` (in, r) and `lora_B` (r,
    out); that of a convolution (h, w, in, out) has (h, w, in, r) and (r, out).

    Attributes:
        settings: as in PEFT's `adapter_config.json`.
        layers: those with an adapter.
        saved: canonical names of parameters that are trained whole, such as the classifier's.
        paths: their paths in the model's tree.
        model_config: the model's configuration.
        head: what stands on the base network, as in `vit_common.parameters`.
        stacked: whether the model's blocks lie in one array each (`scan_layers=True`).
    """

    settings: LoraSettings
    layers: tuple[Layer, ...]
    saved: tuple[str, ...]
    paths: tuple[Path, ...]
    model_config: Any
    head: Head | None
    stacked: bool

    def init(self, params: Params, key: jax.Array | None = None) -> dict[str, Any]:
        """The trees before the first step: B is zero, so the merged model is the model itself.

        Args:
            params: the model's parameters.
            key: of the random A, whose entries are uniform within 1 / sqrt(in); None is
                `jax.random.key(0)`. A layer's values depend on the key and its name alone.

        Returns:
            {"model": params, "lora": adapters}; the adapters in the kernels' dtype, float32 at
            least.
        """
        key = jax.random.key(0) if key is None else key
        single = flatten_dict(unstack_layers(params))
        flat: dict[Path, Any] = {}
        for layer in self.layers:
            kernel = jnp.asarray(single[*layer.path, "kernel"])
            dtype = jnp.promote_types(kernel.dtype, jnp.float32)
            *inputs, outputs = layer.shape
            bound = 1.0 / math.sqrt(math.prod(inputs))
            own = jax.random.fold_in(key, zlib.crc32(layer.name.encode()))
            flat[*layer.path, A] = jax.random.uniform(
                own, (*inputs, layer.rank), dtype, -bound, bound
            )
            flat[*layer.path, B] = jnp.zeros((layer.rank, outputs), dtype)
            if self.settings.dora:
                flat[*layer.path, MAGNITUDE] = _norm(kernel.astype(dtype), layer.shape)
        tree = unflatten_dict(flat)
        return {MODEL: dict(params), LORA: stack_layers(tree) if self.stacked else tree}

    def merge(self, params: Params) -> dict[str, Any]:
        """The model's parameters with the adapters in them.

        It is a function of arrays: pass it to `make_step` as `materialize`, so that gradients reach
        A and B through it.

        Args:
            params: {"model": ..., "lora": ...}.

        Returns:
            A tree as the model takes it.
        """
        flat = flatten_dict(dict(params[MODEL]))
        adapters = flatten_dict(dict(params[LORA]))
        for layer in self._places():
            kernel, a, b = flat[*layer.path, "kernel"], *(adapters[*layer.path, x] for x in (A, B))
            delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            new = kernel.astype(delta.dtype) + self._scale(layer) * delta
            if self.settings.dora:
                # Its gradient does not go through the norm (section 4.3).
                norm = jax.lax.stop_gradient(_norm(new, layer.shape))
                factor = adapters[*layer.path, MAGNITUDE] / norm
                new = new * jnp.expand_dims(factor, tuple(range(-len(layer.shape), -1)))
            flat[*layer.path, "kernel"] = new
        return unflatten_dict(flat)

    def trainable(self, path: str) -> bool:
        """Whether a parameter is trained, by its path in the two trees ("lora/vit/...", "model/
        classifier/kernel"): the adapters are, and what is saved whole."""
        first, _, rest = path.partition("/")
        return first == LORA or (first == MODEL and tuple(rest.split("/")) in self.paths)

    def num_parameters(self, params: Params | None = None) -> int:
        """Number of parameters that are trained.

        Args:
            params: the two trees, or the model's; counts the parameters that are trained whole too.
                None counts the adapters alone.
        """
        count = 0
        for layer in self.layers:
            *inputs, outputs = layer.shape
            count += layer.rank * (math.prod(inputs) + outputs) + outputs * self.settings.dora
        if params is not None:
            tree = params.get(MODEL, params)
            flat = flatten_dict(dict(tree))
            count += sum(math.prod(np.shape(flat[path])) for path in self.paths)
        return count

    def save(
        self,
        folder: str | os.PathLike,
        params: Params,
        *,
        names: str = "transformers-4",
        base: str | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> list[File]:
        """Write a PEFT adapter folder; as `save_adapter`."""
        adapter = self._adapter(params)
        config = self.model_config
        base = base or config.name_or_path or None
        text = json.dumps(_described(config, self.head), indent=2, sort_keys=True) + "\n"
        return write_adapter(
            folder,
            adapter,
            names,
            family=config.base_model_prefix,
            head=self.head is not None,
            layers=config.num_hidden_layers,
            base=base,
            beside={"config.json": text, **(beside or {})},
        )

    def _scale(self, layer: Layer) -> float:
        return layer.alpha / (math.sqrt(layer.rank) if self.settings.rslora else layer.rank)

    def _places(self) -> Iterable[Layer]:
        """The layers as they lie in the model's tree: one for all blocks where they are stacked."""
        if not self.stacked:
            return self.layers
        found: dict[Path, Layer] = {}
        for layer in self.layers:
            path = _stacked(layer.path)
            found.setdefault(path, replace(layer, path=path))
        return found.values()

    def _adapter(self, params: Params) -> Adapter:
        """As the converter holds it."""
        flat = flatten_dict(unstack_layers(params[LORA]))
        layers = {}
        for layer in self.layers:
            a, b = (np.asarray(flat[*layer.path, name]) for name in (A, B))
            magnitude = flat.get((*layer.path, MAGNITUDE))
            if len(layer.shape) == _CONVOLUTION:
                a, b = a.transpose(3, 2, 0, 1), b.T[:, :, None, None]
                if magnitude is not None:
                    magnitude = magnitude.reshape(1, -1, 1, 1)
            else:
                a, b = a.T, b.T
            magnitude = None if magnitude is None else np.asarray(magnitude)
            layers[unprefixed(layer.name)] = LowRank(
                a, b, layer.alpha, self.settings.rslora, magnitude
            )
        whole = canonical_tensors(unstack_layers(params[MODEL])).tensors
        saved = {unprefixed(name): whole[unprefixed(name)].read() for name in self.saved}
        gated = self.model_config.use_swiglu_ffn
        return Adapter(self.settings, layers, saved, generation="", gated=gated)


def lora(
    model: Any,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Iterable[str] = ("query", "value"),
    *,
    rslora: bool = False,
    dora: bool = False,
    modules_to_save: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Lora:
    """Adapters for a model.

    Args:
        model: a Flax model of this package.
        rank: r.
        alpha: the update is multiplied by alpha / r; None is r.
        targets: the layers that get one, as PEFT takes them: ends of their names in Transformers 4
            ("query", "attention.output.dense") or 5 ("q_proj"); a regular expression of the whole
            name; or "all-linear". Among names, "mlp" stands for both layers of each MLP, which
            have no end of a name to themselves in Transformers 4.
        rslora: multiply by alpha / sqrt(r) instead.
        dora: train the norm of each output's weights apart from their direction.
        modules_to_save: modules that are trained whole and saved with the adapter; None is the
            head, which is new in most fine-tuning.
        layers: numbers of the blocks that get adapters; None is all.
        rank_pattern, alpha_pattern: end of a layer's name, as a regular expression -> its r or
            alpha.

    Raises:
        InputError: no layer has such a name; a value is out of range; the weights are integers; or
            the blocks of a model with `scan_layers` would differ.

    Example:
        >>> adapter = lora(model, rank=16, targets=("query", "value"))
        >>> state = TrainState.create(
        ...     model, optimizer, params=adapter.init(model.params), trainable=adapter.trainable
        ... )
        >>> step = make_step(
        ...     model, loss, optimizer, materialize=adapter.merge, trainable=adapter.trainable
        ... )
        >>> save_adapter("my-adapter", adapter, state.params, names="transformers-5")
    """
    saved = _heads(model) if modules_to_save is None else tuple(modules_to_save)
    layers = None if layers is None else list(layers)
    if not isinstance(targets, str):
        targets = _named(model, tuple(targets), layers)
    table = plain_table(
        None,
        rank=rank,
        alpha=rank if alpha is None else alpha,
        targets=targets,
        saved=saved,
        rslora=rslora,
        dora=dora,
    )
    table |= {
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "layers_to_transform": layers,
    }
    try:
        settings = LoraSettings.from_dict(table)
    except ValueError as error:
        raise InputError(str(error).replace("adapter_config.json: ", "")) from error
    return _chosen(model, settings)


def save_adapter(
    folder: str | os.PathLike,
    adapter: Lora,
    params: Params,
    *,
    names: str = "transformers-4",
    base: str | None = None,
    beside: Mapping[str, str] | None = None,
) -> list[File]:
    """Write an adapter folder that PEFT, `from_pretrained` and every command load.

    Args:
        folder: made if it is not there.
        adapter: what `lora` made.
        params: {"model": ..., "lora": ...}, as a training state holds it.
        names: "transformers-4" or "transformers-5": under which generation of Transformers PEFT is
            to load it (here both load).
        base: name or folder of the base model; None is where the model was loaded from.
        beside: other files of the folder, such as "preprocessor_config.json": name -> text.

    Returns:
        The files: weights, `adapter_config.json`, and `config.json` with the names of the classes.

    Raises:
        InputError: there is no such generation.
        MissingFileError: it cannot be written.
    """
    return adapter.save(folder, params, names=names, base=base, beside=beside)


def load_adapter(folder: str | os.PathLike, model: Any, **hub: Any) -> tuple[Lora, dict[str, Any]]:
    """An adapter folder beside its base model, to train it further.

    (To run it, `from_pretrained(folder)` gives the merged model.)

    Args:
        folder: of PEFT's files, or a name on the Hub.
        model: the base model, with a head of the adapter's classes.
        **hub: options of the Hub.

    Returns:
        The adapter, and {"model": ..., "lora": ...}.

    Raises:
        CheckpointError: it is for another model, or has what cannot be trained here.
    """
    found = read_adapter(folder, family=model.config.base_family, **hub)
    settings = replace(found.settings, saved=())
    adapter = _chosen(model, settings, found.layers)
    names = tuple(name for name in _names(model) if unprefixed(name) in found.saved)
    adapter = replace(adapter, saved=names, paths=_paths(model, names))
    known = {unprefixed(name) for name in names}
    if lost := sorted({*found.saved} - known):
        raise CheckpointError(f"{folder}: {type(model).__name__} has no {some(lost, 6)}.")
    flat: dict[Path, Any] = {}
    for layer in adapter.layers:
        change = found.layers[unprefixed(layer.name)]
        if fault := change.fault(_canonical_shape(layer.shape)):
            raise CheckpointError(f"{folder}: {layer.name}: {fault}.")
        if change.bias is not None:
            raise CheckpointError(f"{folder}: {layer.name}: `lora_bias` cannot be trained here.")
        a, b, magnitude = change.a, change.b, change.magnitude
        conv = len(layer.shape) == _CONVOLUTION
        flat[*layer.path, A] = jnp.asarray(a.transpose(2, 3, 1, 0) if conv else a.T)
        flat[*layer.path, B] = jnp.asarray(b.reshape(len(b), -1).T)
        if magnitude is not None:
            flat[*layer.path, MAGNITUDE] = jnp.asarray(magnitude.reshape(-1))
    tree = unflatten_dict(flat)
    params = unstack_layers(model.network_params)
    own = flatten_dict(params)
    for name in names:
        path = _tree_paths(model)[name]
        array = found.saved[unprefixed(name)]
        array = array.transpose(2, 3, 1, 0) if array.ndim == _CONVOLUTION else array
        array = array.T if array.ndim == 2 and path[-1] == "kernel" else array
        if np.shape(own[path]) != array.shape:
            raise CheckpointError(
                f"{folder}: {name} is {array.shape}; the model's is {np.shape(own[path])}. Load "
                "the base model with the adapter's number of classes (`num_labels`)."
            )
        own[path] = jnp.asarray(array, own[path].dtype)
    params = unflatten_dict(own)
    if adapter.stacked:
        params, tree = stack_layers(params), stack_layers(tree)
    return adapter, {MODEL: params, LORA: tree}


# -- which layers


def _tree_paths(model: Any) -> dict[str, Path]:
    """Canonical name -> path in the tree, blocks one by one."""
    return dict(zip(model._canonical_shapes(), model._single_shapes, strict=True))


def _names(model: Any) -> list[str]:
    return [*model._canonical_shapes()]


def _paths(model: Any, names: Iterable[str]) -> tuple[Path, ...]:
    """Paths of parameters in the model's own tree."""
    paths = _tree_paths(model)
    found = (paths[name] for name in names)
    return tuple(dict.fromkeys(_stacked(path) if model.scan_layers else path for path in found))


def _named(model: Any, targets: tuple[str, ...], layers: list[int] | None) -> tuple[str, ...]:
    """Targets with the names of its layers in the place of "mlp"."""
    if MLP not in targets:
        return targets
    found = []
    for name in _names(model):
        match = _MLP_LAYER.search(name)
        if match is not None and (layers is None or int(match[1]) in layers):
            found.append(layer_names(model.config, name.removesuffix(".weight"))[0])
    return tuple(dict.fromkeys((*(t for t in targets if t != MLP), *found)))


def _heads(model: Any) -> tuple[str, ...]:
    """Modules of the head."""
    names = _names(model) if model.head is not None else []
    starts = [s for s in HEAD_PARAMETERS if s.endswith(".") and s != "pooler."]
    return tuple(s[:-1] for s in starts if any(name.startswith(s) for name in names))


def _stacked(path: Path) -> Path:
    """Where a block's parameter lies once blocks are stacked."""
    i = next((i for i in range(2, len(path)) if path[i - 2 : i] == ("encoder", "layer")), None)
    return path if i is None or not path[i].isdecimal() else (*path[:i], STACKED, *path[i + 1 :])


def _chosen(model: Any, settings: LoraSettings, given: Mapping[str, LowRank] | None = None) -> Lora:
    """The layers that settings ask for; or those that an adapter has."""
    config, shapes, single = model.config, model._canonical_shapes(), model._single_shapes
    layers, all_names = [], []
    for (name, shape), (path, kernel) in zip(shapes.items(), single.items(), strict=True):
        if not name.endswith(".weight") or len(shape) not in (2, _CONVOLUTION):
            continue
        layer = name.removesuffix(".weight")
        if path[-1] != "kernel":
            continue
        names = layer_names(config, layer)
        all_names += names
        if given is not None:
            change = given.get(unprefixed(layer))
            if change is not None:
                layers.append(Layer(layer, path[:-1], kernel, change.rank, change.alpha))
            continue
        if any(settings.targets_layer(n, dense=len(shape) == 2) for n in names):
            own = [(settings.rank_of(n), settings.alpha_of(n)) for n in names]
            usual = (settings.rank, settings.alpha)
            rank, alpha = next((pair for pair in own if pair != usual), usual)
            layers.append(Layer(layer, path[:-1], kernel, rank, alpha))
    if given is not None and (lost := sorted({*given} - {unprefixed(x.name) for x in layers})):
        raise CheckpointError(f"{type(model).__name__} has no {some(lost, 6)}.")
    if given is None:
        _check_targets(settings, layers, all_names)
    held = jax.tree.leaves(getattr(model, "_params", None))
    if any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in held):
        raise InputError(
            "adapters need floating point weights; these are integers (8-bit weights are for "
            "inference). Load the model without `weights`."
        )
    if model.scan_layers:
        _check_alike(layers, config.num_hidden_layers)
    masked = given is None and model.head in ("decoder", "tokens")
    whole = tuple(
        name
        for name in _names(model)
        if any(_is_module(name.rpartition(".")[0], module) for module in settings.saved)
        or (masked and name.endswith("embeddings.mask_token"))  # as new as the head
    )
    for module in settings.saved:
        if not any(_is_module(name.rpartition(".")[0], module) for name in whole):
            raise InputError(f"`modules_to_save`: {type(model).__name__} has no {module!r}.")
    return Lora(
        settings,
        tuple(layers),
        whole,
        _paths(model, whole),
        config,
        model.head,
        bool(model.scan_layers),
    )


def _is_module(owner: str, module: str) -> bool:
    return f".{owner}.".find(f".{module}.") >= 0


def _check_targets(settings: LoraSettings, layers: list[Layer], names: list[str]) -> None:
    """Raise InputError if a target is the name of no layer."""
    targets = settings.targets
    if isinstance(targets, str):
        wrong = [] if layers else [targets]
    else:
        wrong = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    ends = dict.fromkeys(re.sub(r".*\.\d+\.(attention\.)*|.*embeddings\.", "", n) for n in names)
    if wrong:
        close = difflib.get_close_matches(wrong[0], ends, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"`targets`: no layer is called {wrong[0]!r}.{hint} Wanted some of {', '.join(ends)}; "
            f"{MLP!r} for both layers of each MLP; or 'all-linear'."
        )
    if not layers:
        raise InputError(
            f"no layer gets an adapter: `targets` {targets!r} and `layers` {settings.layers!r} "
            "leave none."
        )


def _check_alike(layers: list[Layer], count: int) -> None:
    """Raise InputError if not all blocks have the same adapters."""
    kinds: dict[Path, list[tuple[int, float]]] = {}
    for layer in layers:
        if (path := _stacked(layer.path)) != layer.path:
            kinds.setdefault(path, []).append((layer.rank, layer.alpha))
    if any(len(found) != count or len(set(found)) > 1 for found in kinds.values()):
        raise InputError(
            "blocks of a model with `scan_layers=True` must all have the same adapters; load the "
            "model without it for `layers`, or ranks and alphas that differ."
        )


# -- arrays


def _norm(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The norm of the weights of each output: (out,), or (L, out) of stacked blocks."""
    axes = tuple(range(-len(shape), -1))
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=axes))


def _canonical_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a kernel as PyTorch has it."""
    if len(kernel) == _CONVOLUTION:
        return (kernel[3], kernel[2], *kernel[:2])
    return kernel[::-1]


def _described(config: Any, head: Head | None) -> dict[str, Any]:
    """The configuration for `config.json`: of the whole model, adapter merged."""
    return {**config.to_dict(), "architectures": [class_name(config, head)]}
