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

from vit_common.checks import resolve_problem_type
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, ImageError, InputError
from vit_common.parameters import class_name
from vit_common.versions import versions
from vit_convert.source import find_processor, open_source
from vit_torch.verify.bounds import BOUNDS, HALF_PRECISION
from vit_torch.verify.diagnose import Cause, diagnose, diagnose_pixels
from vit_torch.verify.parity import Stage, difference
from vit_torch.verify.stages import arrays_and_flags, as_tensors, flax_stages, torch_stages

DTYPES = ("float64", "float32", "bfloat16", "float16")
PRECISIONS = ("highest", "default")
_HALF = ("bfloat16", "float16")
_PIXELS = 1e-6  # on what processors make of an image: they are the same numpy, or differ at once

_PACKAGES = ("python", "vit-flax", "jax", "jaxlib", "flax", "torch", "numpy", "transformers")


@dataclass(frozen=True)
class Checked:
    """A stage and the bound it was held against."""

    stage: Stage
    bound: float
    value: float

    @property
    def passed(self) -> bool:
        """Whether it is within its bound; what is not finite is not."""
        return bool(np.isfinite([self.value, self.bound]).all()) and self.value <= self.bound


@dataclass
class Row:
    """One comparison.

    Attributes:
        device: what the Flax model ran on; `dtype` and `precision` of its matrix products.
        against: what it was compared with.
        rule: what the bound is of: "absolute", or "error ratio" in half precision.
        stages: in the order of the network.
        unmatched: what only one of the two has, or both in different shapes.
        causes: changes that bring the first stage over its bound nearer; empty where none of those
            known does, None where none was tried.
    """

    device: str
    dtype: str
    precision: str
    against: str
    rule: str
    stages: list[Checked]
    unmatched: list[str] = field(default_factory=list)
    causes: list[Cause] | None = None

    @property
    def passed(self) -> bool:
        """Whether both have the same stages, and every one is within its bound."""
        within = all(checked.passed for checked in self.stages)
        return within and bool(self.stages) and not self.unmatched

    @property
    def first_over(self) -> Checked | None:
        """The first stage over its bound, or None."""
        return next((checked for checked in self.stages if not checked.passed), None)

    @property
    def agreeing(self) -> list[Cause]:
        """The causes that bring the first stage within its bound; a few at most."""
        over = self.first_over
        bound = 0.0 if over is None else over.bound
        return [cause for cause in self.causes or () if cause.after <= bound][:3]

    @property
    def worst(self) -> Checked | None:
        """The stage closest to its bound, or furthest over it; None where none was compared."""

        def part(checked: Checked) -> float:
            finite = np.isfinite([checked.value, checked.bound]).all()
            return checked.value / max(checked.bound, 1e-300) if finite else np.inf

        return max(self.stages, key=part, default=None)


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
        """Whether there are rows, and every one is."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it: None for a number that is not finite."""
        table = _finite(asdict(self))
        table["passed"] = self.passed
        for row, own in zip(table["rows"], self.rows, strict=True):
            row["passed"] = own.passed
            over = own.first_over
            row["first_over"] = None if over is None else over.stage.name
            for stage, checked in zip(row["stages"], own.stages, strict=True):
                stage["passed"] = checked.passed
        return table


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


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
        devices: "cpu", "gpu", "tpu": where the Flax models run. The PyTorch twin runs on the CPU.
        dtypes: of `DTYPES`. float64 and float32 are held against an absolute bound; half precision
            against the twin's own error.
        image_size: (height, width) other than the model's; positions are resampled.
        batch: number of random images; given `images`, left at 2.
        gradients: compare the gradient of every parameter as well, in float64 and float32.
        format: of both checkpoints, where it cannot be told.
        bounds: instead of `vit_torch.verify.bounds.BOUNDS`.
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
        if wrong or not given:
            odd = repr(wrong[0]) if wrong else "none"
            raise InputError(f"`{name}` must be of {', '.join(known)}; given {odd}.")
    if images and batch != 2:
        raise InputError(f"`batch` is of random images; given {batch!r} beside `images`.")
    table = {**BOUNDS, **(bounds or {})}
    runs, notes = _plan(_places(devices), dtypes, gradients)
    subject = _Subject(first, format, hub)
    other = None if second is None else _Subject(second, format, hub)
    if other is not None:
        subject.check_like(other, but=("image_size",) if image_size is not None else ())
    pixels, size = _pixels(subject, images, image_size, batch)
    inputs: dict[str, Any] = {}
    if size != subject.config.image_height_width:
        inputs["interpolate_pos_encoding"] = True
    inputs |= subject.extra_inputs(len(pixels), size)
    rows: list[Row] = []
    if other is not None:
        notes = subject.differences(other) + notes
        prepared = _compare_pixels(subject, other, images)
        if isinstance(prepared, Row):
            rows.append(prepared)
        else:
            notes.append(prepared)
    for place, dtype, precision in runs:
        rows.append(_row(subject, other, pixels, inputs, place, dtype, precision, table, gradients))
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
            found = find_processor(source)
            self.format = source.table.name
        self.processor = None if found is None else found[0]

    def check_like(self, other: _Subject, but: tuple[str, ...] = ()) -> None:
        """Raise ConfigError unless both take the same inputs and are of one size."""
        sizes = (
            "image_size",
            "num_channels",
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
        elif self.problem_type != other.problem_type:
            odd.append(f"problem_type {self.problem_type!r} and {other.problem_type!r}")
        if odd:
            raise ConfigError(
                f"{self.name} and {other.name} are not versions of one network: {'; '.join(odd)}."
            )

    @property
    def problem_type(self) -> str | None:
        """What the classifier's loss is; None without one."""
        return resolve_problem_type(self.config, True) if self.head == "classifier" else None

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
        if self.head == "classifier":
            classes = self.config.num_labels
            if self.problem_type != "single_label_classification":
                return {"labels": rng.integers(0, 2, (batch, classes)).astype(np.float32)}
            if classes > 1:  # of one class the loss is zero, whatever the network
                return {"labels": rng.integers(0, classes, batch)}
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


def _plan(
    places: Sequence[Any], dtypes: Sequence[str], gradients: bool
) -> tuple[list[tuple[Any, str, str]], list[str]]:
    """(device, dtype, precision) of every row, and notes on what was asked for and is left out.

    Where float32 can mean less than float32, both precisions are run.

    Raises:
        InputError: nothing is left.
    """
    runs, notes = [], []
    for dtype in dtypes:
        for place in places:
            if place.platform == "tpu" and dtype == "float64":
                notes.append("float64 was left out on the tpu, which has none")
            elif dtype == "float32" and place.platform != "cpu":
                runs += [(place, dtype, precision) for precision in PRECISIONS]
            else:
                runs.append((place, dtype, "highest"))
    exact = [dtype for _, dtype, _ in runs if dtype not in _HALF]
    half = [dtype for dtype in dtypes if dtype in _HALF]
    if gradients and half:
        notes.append(f"gradients were left out in {', '.join(half)}: only of float64 and float32")
    if not runs or (gradients and not exact):
        raise InputError(
            f"nothing of what was asked for can be compared: {'; '.join(notes)}; name another of "
            "`dtypes`."
        )
    return runs, notes


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
        pixels = _prepared(subject.processor, images)
        if image_size is not None and pixels.shape[2:] != size:
            raise InputError(
                f"the images are prepared at {pixels.shape[2]} x {pixels.shape[3]}; `image_size` "
                "is for random numbers."
            )
        return pixels, (pixels.shape[2], pixels.shape[3])
    if batch < 1:
        raise InputError(f"`batch` must be a positive integer; given {batch!r}.")
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, config.num_channels, *size)), size


def _prepared(processor: Any, images: Sequence[Any]) -> np.ndarray:
    """What a processor makes of images, (B, C, H, W)."""
    pixels = processor(list(images), return_tensors="np")["pixel_values"]
    return np.asarray(pixels).astype(np.float64)


# -- one row


def _row(subject, other, pixels, inputs, place, dtype, precision, table, gradients) -> Row:
    half = dtype in _HALF
    gradients = gradients and not half
    label = place.platform if place.platform == "cpu" else f"{place.platform} {place.device_kind}"

    def of_flax(which: _Subject) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        with _on(place, dtype):
            model = which.flax(dtype, precision)
            stages = flax_stages(model, _as(pixels, dtype), **inputs)
            return stages, _flax_gradients(model, pixels, inputs, dtype) if gradients else {}

    ours, own = of_flax(subject)
    if other is not None:
        theirs, their_own = of_flax(other)
        against, sides = str(other.name), (str(subject.name), str(other.name))
    else:
        twin = subject.torch(dtype)
        theirs = torch_stages(twin, _as(pixels, "float32" if half else dtype), **inputs)
        their_own = _torch_gradients(twin, pixels, inputs, dtype) if gradients else {}
        del twin
        against, sides = f"PyTorch twin, cpu, {dtype}", ("the Flax twin", "the PyTorch twin")
    names, unmatched = _match(ours, theirs, sides)
    if half and other is None:
        exact = torch_stages(subject.torch("float32"), _as(pixels, "float32"), **inputs)
        # A loss is one number: its rounding says nothing.
        stages = [_half(n, ours[n], theirs[n], exact[n]) for n in names if n != "loss"]
        return Row(label, dtype, precision, against, "error ratio", stages, unmatched)
    kind = "float32" if half else dtype
    bound, gradient_bound = table[f"twins {kind}"], table[f"gradients {kind}"]
    # float32 at an accelerator's default precision: TF32 and bfloat16 keep 10 and 7 bits.
    if half or precision == "default":
        bound = gradient_bound = 2.0**-6
    if other is not None:  # the twins' stages are in the order of the PyTorch twin's calls
        names.sort(key=_depth)
    stages = []
    for name in names:
        stage = difference(name, ours[name], theirs[name])
        scale = max(1.0, stage.scale) if np.isfinite(stage.scale) else 1.0
        stages.append(Checked(stage, bound * scale, stage.max_abs))
    names, odd = _match(own, their_own, sides, "gradient of ")
    row = Row(label, dtype, precision, against, "absolute", stages, unmatched + odd)
    # The gradient of a key's bias is zero but for rounding, so one that is tiny beside the others
    # is held against them.
    largest = max((float(np.abs(g).max(initial=0.0)) for g in their_own.values()), default=0)
    for name in names:
        stage = difference(f"gradient of {name}", own[name], their_own[name])
        scale = max(stage.scale, 1e-2 * largest, 1e-300)
        row.stages.append(Checked(stage, gradient_bound, stage.max_abs / scale))
    if row.first_over is not None and precision != "default":
        row.causes = _causes(row, subject, other, ours, pixels, dtype)
    return row


def _match(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    sides: tuple[str, str],
    prefix: str = "",
) -> tuple[list[str], list[str]]:
    """The names that can be compared, in the order of `theirs`; and what cannot, in words."""
    unmatched = []
    for here, there, who in ((ours, theirs, sides[0]), (theirs, ours, sides[1])):
        alone = [prefix + name for name in here if name not in there]
        if alone:
            unmatched.append(f"{who} alone has {_few(alone)}")
    both = [name for name in theirs if name in ours]
    odd = {name for name in both if ours[name].shape != theirs[name].shape}
    if odd:
        pairs = [f"{prefix}{n} {ours[n].shape} and {theirs[n].shape}" for n in both if n in odd]
        unmatched.append(f"the shapes differ: {_few(pairs)}")
    return [name for name in both if name not in odd], unmatched


def _few(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


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
        with np.errstate(invalid="ignore"):
            return float(np.sqrt(np.mean((array - exact) ** 2)))

    stage = difference(name, ours, exact)
    reference = rms(theirs)
    scale = float(np.abs(exact).max(initial=0.0))
    # Below a rounding of the largest value there is nothing to compare.
    floor = 2.0**-12 * scale / max(exact.size, 1) ** 0.5
    # Any error is small beside that of a twin that overflowed.
    ratio = rms(ours) / max(reference, floor, 1e-30) if np.isfinite(reference) else np.nan
    return Checked(stage, HALF_PRECISION, ratio)


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
    from vit_convert.rules import unprefixed

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


def _causes(row, subject, other, ours, pixels, dtype) -> list[Cause] | None:
    over = row.first_over
    if over.stage.name.startswith("gradient"):
        return None
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
    height, width = subject.config.patch_height_width
    grid = (pixels.shape[2] // height, pixels.shape[3] // width)
    return diagnose(name, model, fed, ours, over.bound, grid)


def _compare_pixels(subject: _Subject, other: _Subject, images: Sequence[Any] | None) -> Row | str:
    """What both make of the images, or of a test picture; or why that cannot be compared."""
    silent = [str(each.name) for each in (subject, other) if each.processor is None]
    if silent:
        who = " and ".join(silent)
        return f"how images are prepared was not compared: nothing says how for {who}"
    pictures = list(images or [_picture(subject.config.num_channels)])
    pixels, refused = [], []
    for each in (subject, other):
        try:
            pixels.append(_prepared(each.processor, pictures))
        except (ImageError, InputError) as error:
            refused.append(f"pixels: {each.name} prepares no such images: {error}")
    if len(refused) == 2:
        return f"how images are prepared was not compared: {refused[0]}"
    row = Row("cpu", "float32", "highest", str(other.name), "absolute", [], refused)
    if refused:
        return row
    ours, theirs = pixels
    if ours.shape != theirs.shape:
        row.unmatched = [
            f"pixels: prepared as {ours.shape[1:]} and {theirs.shape[1:]} (channels, height, width)"
        ]
        return row
    stage = difference("pixels", ours, theirs)
    row.stages.append(Checked(stage, _PIXELS, stage.max_abs))
    if not row.passed:
        worst = stage.where[0]
        row.causes = diagnose_pixels(
            other.processor, pictures[worst], ours[worst : worst + 1], _PIXELS
        )
    return row


def _picture(channels: int) -> np.ndarray:
    """Smooth noise, (480, 640) or (480, 640, C)."""
    import PIL.Image

    coarse = np.random.default_rng(2).integers(0, 256, (channels, 12, 16), np.uint8)
    bands = [
        np.asarray(PIL.Image.fromarray(band).resize((640, 480), PIL.Image.Resampling.BICUBIC))
        for band in coarse
    ]
    return bands[0] if channels == 1 else np.stack(bands, axis=-1)
