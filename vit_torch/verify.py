"""`verify`: are two models the same, stage by stage, on every device and in every precision?

One checkpoint is checked with its own weights in the Flax and the PyTorch twin; two checkpoints
against each other, both in Flax. What differs first is run again to find out why.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from convert.source import find_processor, open_source
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError
from vit_common.parameters import class_name
from vit_common.versions import versions
from vit_torch.bounds import BOUNDS, HALF_PRECISION
from vit_torch.diagnose import Cause, diagnose, diagnose_pixels
from vit_torch.parity import Stage, difference
from vit_torch.stages import arrays_and_flags, as_tensors, flax_stages, torch_stages

DTYPES = ("float64", "float32", "bfloat16", "float16")
PRECISIONS = ("highest", "default")

_PACKAGES = ("python", "vit-flax", "jax", "jaxlib", "flax", "torch", "numpy", "transformers")


@dataclass(frozen=True)
class Checked:
    """A stage and the bound it was held against."""

    stage: Stage
    bound: float
    value: float

    @property
    def passed(self) -> bool:
        """Whether it is within its bound; NaN is not."""
        return self.value <= self.bound


@dataclass
class Row:
    """One comparison.

    Attributes:
        device: what the Flax model ran on; `dtype` and `precision` of its matrix products.
        against: what it was compared with.
        rule: what the bound is of: "absolute", or "error ratio" in half precision.
        stages: in the order of the network.
        causes: why the first stage over its bound differs, as far as that could be found.
    """

    device: str
    dtype: str
    precision: str
    against: str
    rule: str
    stages: list[Checked]
    causes: list[Cause] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every stage is within its bound."""
        return all(checked.passed for checked in self.stages)

    @property
    def first_over(self) -> Checked | None:
        """The first stage over its bound, or None."""
        return next((checked for checked in self.stages if not checked.passed), None)

    @property
    def agreeing(self) -> list[Cause]:
        """The causes that bring the first stage within its bound; a few at most."""
        over = self.first_over
        bound = 0.0 if over is None else over.bound
        return [cause for cause in self.causes if cause.after <= bound][:3]

    @property
    def worst(self) -> Checked:
        """The stage closest to its bound, or furthest over it."""
        return max(
            self.stages,
            key=lambda c: np.inf if np.isnan(c.value) else c.value / c.bound if c.bound else 0.0,
        )


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        first, second: the models; `second` is None where the twins of one were compared.
        family, head: of the first.
        image_size, batch: what they ran on.
        rows: one a device, dtype and precision.
        versions: of the packages.
        notes: what to know.
    """

    first: str
    second: str | None
    family: str
    head: str | None
    image_size: tuple[int, int]
    batch: int
    rows: list[Row]
    versions: dict[str, str | None]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every row is."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        table = asdict(self)
        table["passed"] = self.passed
        for row, own in zip(table["rows"], self.rows, strict=True):
            row["passed"] = own.passed
            over = own.first_over
            row["first_over"] = None if over is None else over.stage.name
            for stage, checked in zip(row["stages"], own.stages, strict=True):
                stage["passed"] = checked.passed
        return table


def verify(
    first: str | os.PathLike,
    second: str | os.PathLike | None = None,
    *,
    images: Sequence[Any] | None = None,
    devices: Sequence[str] = ("cpu",),
    dtypes: Sequence[str] = ("float32",),
    image_size: tuple[int, int] | None = None,
    batch: int = 2,
    gradients: bool = False,
    format: str | None = None,
    bounds: Mapping[str, float] | None = None,
    **hub: Any,
) -> Verification:
    """Compare a checkpoint's Flax and PyTorch twins, or two checkpoints.

    Args:
        first, second: directory, weights file or Hub name; in any format.
        images: PIL images or arrays for the models; None draws random numbers.
        devices: "cpu", "gpu", "tpu": where the Flax models run. The PyTorch twin runs on the CPU,
            and on the GPU too where torch has it.
        dtypes: of `DTYPES`. float64 and float32 are held against an absolute bound; half precision
            against the twin's own error.
        image_size: (height, width) other than the model's; positions are resampled.
        batch: number of random images.
        gradients: compare the gradient of every parameter as well.
        format: of both checkpoints, where it cannot be told.
        bounds: instead of `vit_torch.bounds.BOUNDS`.
        **hub: options of the Hub.

    Returns:
        What was found; `passed` says whether all was within bounds.

    Raises:
        ViTError: a model cannot be loaded, the two cannot be compared, or an option is wrong.
    """
    for name, given, known in (
        ("dtypes", dtypes, DTYPES),
        ("devices", devices, ("cpu", "gpu", "tpu")),
    ):
        wrong = [value for value in given if value not in known]
        if wrong:
            raise InputError(f"`{name}` must be of {', '.join(known)}; given {wrong[0]!r}.")
    table = {**BOUNDS, **(bounds or {})}
    places = _places(devices)
    subject = _Subject(first, format, hub)
    other = None if second is None else _Subject(second, format, hub)
    if other is not None:
        subject.check_like(other, but=("image_size",) if image_size is not None else ())
    pixels, size = _pixels(subject, images, image_size, batch)
    inputs: dict[str, Any] = {}
    if size != subject.config.image_height_width:
        inputs["interpolate_pos_encoding"] = True
    inputs |= subject.extra_inputs(len(pixels), size)
    notes = [] if other is None else subject.differences(other)
    rows: list[Row] = []
    prepared = _compare_pixels(subject, other, table)
    if prepared is not None:
        rows.append(prepared)
    for dtype in dtypes:
        for place, precision in _runs(places, dtype):
            rows.append(
                _row(subject, other, pixels, inputs, place, dtype, precision, table, gradients)
            )
            gc.collect()
    return Verification(
        first=str(first),
        second=None if second is None else str(second),
        family=subject.config.model_type,
        head=subject.head,
        image_size=size,
        batch=len(pixels),
        rows=rows,
        versions=versions(*_PACKAGES),
        notes=notes,
    )


class _Subject:
    """A checkpoint, and its models when asked for."""

    def __init__(self, name: Any, format: str | None, hub: Mapping[str, Any]) -> None:
        self.name, self.format, self.hub = name, format, dict(hub)
        with open_source(name, format=format, **hub) as source:
            self.config: ViTConfig = source.config
            self.head = source.head
            self.pooled = any(key.startswith("pooler.") for key in source.mapped.tensors)
            self.masked = "embeddings.mask_token" in source.mapped.tensors
            found = find_processor(source, name, **hub)
            self.format = source.table.name
        self.processor = None if found is None else found[0]

    def check_like(self, other: _Subject, but: tuple[str, ...] = ()) -> None:
        """Raise ConfigError unless both have the same stages."""
        sizes = (
            "image_size",
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "patch_size",
            "num_labels",
        )
        odd = [
            f"{name} {getattr(self.config, name)!r} and {getattr(other.config, name)!r}"
            for name in sizes
            if name not in but and getattr(self.config, name) != getattr(other.config, name)
        ]
        if self.head != other.head:
            odd.append(f"head {self.head!r} and {other.head!r}")
        if odd:
            raise ConfigError(
                f"{self.name} and {other.name} are not versions of one network: {'; '.join(odd)}."
            )

    def differences(self, other: _Subject) -> list[str]:
        """What the configurations do not have in common."""
        names = [
            name
            for name in self.config.fields
            if name not in ("architectures", "id2label", "label2id", "dtype")
            and getattr(self.config, name) != getattr(other.config, name)
        ]
        if not names:
            return []
        pairs = [
            f"{name} ({getattr(self.config, name)!r} and {getattr(other.config, name)!r})"
            for name in names
        ]
        return [f"the configurations differ in {', '.join(pairs)}"]

    def _class(self, module: Any, flax: str) -> Any:
        return getattr(module, flax + class_name(self.config, self.head))

    def _options(self) -> dict[str, Any]:
        plain = self.head is None and self.config.model_type in ("vit", "deit")
        return {"add_pooling_layer": self.pooled, "use_mask_token": self.masked} if plain else {}

    def torch(self, dtype: str, attn_implementation: str = "eager") -> Any:
        """The PyTorch twin."""
        import vit_torch

        return self._class(vit_torch, "").from_pretrained(
            self.name,
            config=self.config,
            format=self.format,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **self._options(),
            **self.hub,
        )

    def flax(self, dtype: str, precision: str) -> Any:
        """The Flax twin."""
        import vit_flax

        return self._class(vit_flax, "Flax").from_pretrained(
            self.name,
            dtype=dtype,
            param_dtype=dtype,
            precision=None if precision == "default" else precision,
            config=self.config,
            format=self.format,
            **self._options(),
            **self.hub,
        )

    def extra_inputs(self, batch: int, size: tuple[int, int]) -> dict[str, Any]:
        """What the head needs to have a loss."""
        rng = np.random.default_rng(1)
        P = self.config.patch_height_width
        patches = size[0] // P[0] * (size[1] // P[1])
        if self.head == "classifier" and self.config.problem_type in (
            None,
            "single_label_classification",
        ):
            if self.config.num_labels > 1:
                return {"labels": rng.integers(0, self.config.num_labels, batch)}
        elif self.head == "decoder":
            return {"bool_masked_pos": rng.integers(0, 2, (batch, patches))}
        elif self.head == "tokens":
            vocabulary = self.config.vocab_size
            return {
                "bool_masked_pos": rng.integers(0, 2, (batch, patches)),
                "labels": rng.integers(0, vocabulary, (batch, patches)),
            }
        return {}


# -- what to run


def _places(devices: Sequence[str]) -> list[Any]:
    """The JAX devices, one of each kind."""
    import jax

    places = []
    for name in dict.fromkeys(devices):
        try:
            places.append(jax.local_devices(backend=name)[0])
        except RuntimeError as error:
            here = ", ".join(sorted({d.platform for d in jax.devices()}))
            raise InputError(f"there is no {name} for JAX here; there is {here}.") from error
    return places


def _runs(places: list[Any], dtype: str) -> Iterator[tuple[Any, str]]:
    """(device, precision): where float32 can mean less than float32, both are run."""
    for place in places:
        if place.platform == "tpu" and dtype == "float64":
            continue  # it has none
        if dtype == "float32" and place.platform != "cpu":
            yield from ((place, precision) for precision in PRECISIONS)
        else:
            yield place, "highest"


@contextlib.contextmanager
def _on(place: Any, dtype: str) -> Iterator[None]:
    import jax

    with jax.enable_x64(dtype == "float64"), jax.default_device(place):
        yield


def _pixels(
    subject: _Subject, images: Sequence[Any] | None, image_size: Any, batch: int
) -> tuple[np.ndarray, tuple[int, int]]:
    config = subject.config
    size = tuple(image_size or config.image_height_width)
    if images:
        if subject.processor is None:
            raise InputError(
                f"{subject.name}: nothing says how images are prepared; leave `images` out to use "
                "random numbers."
            )
        pixels = np.stack(
            [
                np.asarray(subject.processor(image, return_tensors="np")["pixel_values"])[0]
                for image in images
            ]
        )
        if image_size is not None and pixels.shape[2:] != size:
            raise InputError(
                f"the images are prepared at {pixels.shape[2]} x {pixels.shape[3]}; `image_size` "
                "is for random numbers."
            )
        return pixels.astype(np.float64), (pixels.shape[2], pixels.shape[3])
    if batch < 1:
        raise InputError(f"`batch` must be a positive integer; given {batch!r}.")
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, config.num_channels, *size)), size


# -- one row


def _row(subject, other, pixels, inputs, place, dtype, precision, table, gradients) -> Row:
    half = dtype in ("bfloat16", "float16")
    label = place.platform if place.platform == "cpu" else f"{place.platform} {place.device_kind}"
    with _on(place, dtype):
        model = subject.flax(dtype, precision)
        ours = flax_stages(model, _as(pixels, dtype), **inputs)
        own = _flax_gradients(model, pixels, inputs, dtype) if gradients and not half else {}
        del model
    if other is not None:
        with _on(place, dtype):
            model = other.flax(dtype, precision)
            theirs = flax_stages(model, _as(pixels, dtype), **inputs)
            theirs_gradients = (
                _flax_gradients(model, pixels, inputs, dtype) if gradients and not half else {}
            )
            del model
        against = str(other.name)
    else:
        twin = subject.torch(dtype)
        theirs = torch_stages(twin, _as(pixels, "float32" if half else dtype), **inputs)
        theirs_gradients = (
            _torch_gradients(twin, pixels, inputs, dtype) if gradients and not half else {}
        )
        del twin
        against = f"PyTorch twin, cpu, {dtype}"
    if half and other is None:
        exact = torch_stages(subject.torch("float32"), _as(pixels, "float32"), **inputs)
        # A loss is one number: its rounding says nothing.
        names = [name for name in exact if name != "loss"]
        stages = [_half(name, ours[name], theirs[name], exact[name]) for name in names]
        return Row(label, dtype, precision, against, "error ratio", stages)
    kind = "float32" if half else dtype
    bound = 2.0**-6 if half else table[f"twins {kind}"]
    # float32 at an accelerator's default precision: TF32 and bfloat16 keep 10 and 7 bits.
    if precision == "default":
        bound = 2.0**-6
    stages = []
    for name in (name for name in ours if name in theirs):
        stage = difference(name, ours[name], theirs[name])
        stages.append(Checked(stage, bound * max(1.0, stage.scale), stage.max_abs))
    # In the order of the network, which is that of the PyTorch twin's calls.
    order = {name: place for place, name in enumerate(theirs)}
    if other is None:
        stages.sort(key=lambda checked: order[checked.stage.name])
    else:
        stages.sort(key=lambda checked: _depth(checked.stage.name))
    row = Row(label, dtype, precision, against, "absolute", stages)
    # The gradient of a key's bias is zero but for rounding, so one that is tiny beside the others
    # is held against them.
    largest = max((float(np.abs(g).max(initial=0.0)) for g in theirs_gradients.values()), default=0)
    for name in own:
        stage = difference(f"gradient of {name}", own[name], theirs_gradients[name])
        scale = max(stage.scale, 1e-2 * largest, 1e-300)
        row.stages.append(Checked(stage, table[f"gradients {kind}"], stage.max_abs / scale))
    if not row.passed and precision != "default":
        row.causes = _causes(row, subject, other, ours, theirs, pixels, dtype)
    return row


def _as(pixels: np.ndarray, dtype: str) -> np.ndarray:
    return pixels.astype(np.float64 if dtype == "float64" else np.float32)


def _depth(name: str) -> tuple[int, int, str]:
    """Where a stage stands in the network."""
    parts = name.split()
    if parts[0] == "block":
        return 1, int(parts[1]) * 10 + ("attention", "MLP", "").index(" ".join(parts[2:])), name
    order = ("patches", "embeddings")
    if name in order:
        return 0, order.index(name), name
    last = ("final norm", "pooled", "head norm")
    return 2, last.index(name) if name in last else len(last), name


def _half(name: str, ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> Checked:
    """In half precision: the Flax twin's error over that of the PyTorch twin."""

    def rms(array: np.ndarray) -> float:
        return float(np.sqrt(np.mean((array - exact) ** 2)))

    stage = difference(name, ours, exact)
    reference = rms(theirs)
    scale = float(np.abs(exact).max(initial=0.0))
    # Below a rounding of the largest value there is nothing to compare.
    floor = 2.0**-12 * scale / max(exact.size, 1) ** 0.5
    return Checked(stage, HALF_PRECISION, rms(ours) / max(reference, floor, 1e-30))


def _flax_gradients(model, pixels, inputs, dtype) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    from vit_flax.pretrained import canonical

    x = jnp.asarray(_as(pixels, dtype))
    arrays, flags = arrays_and_flags(inputs)

    def loss(params, arrays):
        output = model.module.apply(
            {"params": params}, x.transpose(0, 2, 3, 1), True, return_dict=True, **arrays, **flags
        )
        if "loss" in output:
            return output.loss
        return _summary(output, jnp)

    tree = jax.jit(jax.grad(loss))(model.params, arrays)
    return {name: tensor.read() for name, tensor in canonical(tree).tensors.items()}


def _torch_gradients(model, pixels, inputs, dtype) -> dict[str, np.ndarray]:
    from convert.rules import unprefixed

    model.zero_grad(set_to_none=True)
    output = model.eval()(
        torch.as_tensor(_as(pixels, dtype)), return_dict=True, **as_tensors(inputs, model.device)
    )
    value = output.loss if "loss" in output else _summary(output, torch)
    value.backward()
    return {
        unprefixed(name): (np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy())
        for name, p in model.named_parameters()
    }


def _summary(output: Any, np_like: Any) -> Any:
    """A number that depends on all of an output without a loss."""
    value = output.logits if "logits" in output else output.last_hidden_state
    total = (value**2).mean()
    if "pooler_output" in output:
        total = total + (output.pooler_output**2).mean()
    return total


# -- causes


def _causes(row, subject, other, ours, theirs, pixels, dtype) -> list[Cause]:
    over = row.first_over
    if over is None or over.stage.name.startswith("gradient"):
        return []
    changed = subject if other is None else other
    # The twin that is changed has the second model's weights; it is to agree with the first.
    model = changed.torch(dtype)
    name = over.stage.name
    number = name.split()[1] if name.startswith("block") else None
    if name in ("patches", "embeddings"):
        fed = _as(pixels, dtype)
    elif number is not None:
        fed = ours["embeddings"] if number == "0" else ours[f"block {int(number) - 1}"]
    elif name == "final norm":
        last = subject.config.num_hidden_layers - 1
        fed = ours[f"block {last}"] if last >= 0 else ours["embeddings"]
    else:
        fed = ours.get("final norm", ours.get("embeddings"))
    return diagnose(name, model, fed, ours, over.bound)


def _compare_pixels(subject: _Subject, other: _Subject | None, table: Any) -> Row | None:
    """What both prepare of one picture, where both say how."""
    if other is None or subject.processor is None or other.processor is None:
        return None
    import PIL.Image

    rng = np.random.default_rng(2)
    channels = subject.config.num_channels
    if channels != 3:
        return None
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    picture = coarse.resize((640, 480), PIL.Image.Resampling.BICUBIC)
    ours, theirs = (
        np.asarray(prepare(picture, return_tensors="np")["pixel_values"]).astype(np.float64)
        for prepare in (subject.processor, other.processor)
    )
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"{subject.name} and {other.name} prepare images at different sizes: "
            f"{ours.shape[2:]} and {theirs.shape[2:]}."
        )
    stage = difference("pixels", ours, theirs)
    row = Row(
        "cpu",
        "float32",
        "highest",
        str(other.name),
        "absolute",
        [Checked(stage, 1e-6, stage.max_abs)],
    )
    if not row.passed:
        row.causes = diagnose_pixels(other.processor, picture, ours, 1e-6)
    return row
