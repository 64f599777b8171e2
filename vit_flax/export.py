"""`export`: a model as one file with a program that JAX runs on other machines, without Flax and
without this package's networks. `load` gives it back; `vit_flax.exported` says what is in the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.containers import safetensors_file
from vit_common.containers.tensor import as_tensor
from vit_common.errors import CheckpointError, InputError
from vit_common.files import check_target, staged
from vit_common.image_processor import BaseImageProcessor
from vit_common.predictions import Prediction
from vit_flax.exported import (
    CHECK,
    CONFIG,
    KIND,
    METADATA,
    PARAMETERS,
    PLATFORMS,
    PROCESSOR,
    PROGRAM,
    VERSION,
    ExportedModel,
    load,
    platform_of,
    serializer,
)

__all__ = ["DYNAMIC", "Export", "ExportedModel", "Prediction", "export", "load"]

DYNAMIC = "dynamic"
"""As `batch`: any number of images."""

BOUNDS = {"float32": 2e-5, "bfloat16": 0.05, "float16": 0.01}
"""Largest difference from the Flax model, by what the model computes in, that an export may have;
multiplied by the largest logit where that is above one."""

_SEPARATOR = "/"
_IMAGES = 3
Reference = Callable[[np.ndarray], np.ndarray]


def disabled_checks() -> Sequence[Any]:
    """`jax.export.DisabledSafetyCheck`s of kernels whose custom calls JAX does not promise to keep
    stable: the one place to name them."""
    return ()


@dataclass
class Export:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        program_bytes: of the program in it; the rest are the parameters.
        metadata: what is in it about the program.
        check: what was measured; None if nothing was.
        seconds: name of a step -> how long it took.
    """

    path: Path
    bytes: int
    program_bytes: int
    metadata: dict[str, Any]
    check: dict[str, Any] | None
    seconds: dict[str, float] = field(default_factory=dict)


def export(
    model: Any,
    path: str | PathLike,
    *,
    image_processor: BaseImageProcessor | None = None,
    platforms: Iterable[str] = ("cpu", "cuda", "tpu"),
    batch: int | Literal["dynamic"] = DYNAMIC,
    output: Literal["logits", "features"] = "logits",
    input_dtype: Literal["float32", "uint8"] = "float32",
    check: bool = True,
    references: Mapping[str, Reference] | None = None,
    force: bool = False,
) -> Export:
    """Write a model as a program of StableHLO with its parameters, preprocessing and labels.

    The file is written beside its place, loaded and run in a fresh process, and only then gets its
    name.

    Args:
        model: a Flax model with its parameters.
        path: the file to write.
        image_processor: what prepares images; None means the Hub's defaults for a ViT. It decides
            the image size where the family takes any.
        platforms: what the program is lowered for: "cpu", "cuda", "rocm", "tpu".
        batch: images a call takes; "dynamic" for any number.
        output: "logits" of a classifier; "features", (B, D), of a base network: the class token
            after the final norm, or the mean of the patches where there is no such token.
        input_dtype: "uint8" takes pixels as they are in a picture, resized and cropped, and does
            the rescaling and normalising in the program.
        check: load the file in a fresh process and compare it with the model, on random pixels.
        references: name -> what else to compare it with; called on `pixel_values` (B, C, H, W),
            float32 and normalised.
        force: overwrite the file.

    Raises:
        InputError: an option is wrong, or nothing here can run the program to check it.
        ConfigError: model and preprocessing contradict each other.
        MissingFileError: the file is there already or cannot be written.
        CheckpointError: the exported program gives other numbers; nothing was written.
    """
    path = Path(path)
    platforms = check_platforms(platforms)
    if batch != DYNAMIC and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise InputError(f"`batch` must be a positive integer or {DYNAMIC!r}; given {batch!r}.")
    if input_dtype not in ("float32", "uint8"):
        raise InputError(f"`input_dtype` must be 'float32' or 'uint8'; given {input_dtype!r}.")
    _check_output(model, output)
    check_target(path, force=force)
    place = _place_to_check(platforms) if check else None
    jax_export = serializer()

    from vit_flax.inference import ImageClassifier

    classifier = ImageClassifier(model, image_processor)
    config, processor = model.config, classifier.image_processor
    shape = (config.num_channels, *classifier.image_size)
    run = _program(model, output, processor if input_dtype == "uint8" else None)
    parameters = _flat(model.params)

    seconds, started = {}, time.perf_counter()
    rows = jax_export.symbolic_shape("b")[0] if batch == DYNAMIC else batch
    with _without_paths():
        exported = jax_export.export(
            jax.jit(run), platforms=platforms, disabled_checks=disabled_checks()
        )(
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in parameters.items()},
            jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(input_dtype)),
        )
        program = bytes(exported.serialize())
    seconds["lowering"] = time.perf_counter() - started

    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    metadata: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "family": config.model_type,
        "input_shape": list(shape),
        "input_dtype": input_dtype,
        "output": output,
        "output_shape": [None if batch == DYNAMIC else batch, exported.out_avals[0].shape[1]],
        "batch": batch,
        "dtype": jnp.dtype(model.dtype).name,
        "platforms": list(platforms),
        "calling_convention_version": exported.calling_convention_version,
        "labels": labels if output == "logits" else [],
        "several": classifier.several,
        "versions": versions("vit-flax", "jax", "jaxlib", "flax"),
    }
    report = Export(path, 0, len(program), metadata, None, seconds)
    with staged(path) as temporary:
        started = time.perf_counter()
        texts = {
            METADATA: json.dumps(metadata, indent=2, ensure_ascii=False),
            CONFIG: config.to_json_string(),
            PROCESSOR: processor.to_json_string(),
        }
        _write(temporary, texts, program, parameters)
        seconds["writing"] = time.perf_counter() - started
        if place is not None:
            started = time.perf_counter()
            pixels, prepared = random_pixels(
                processor, shape, _IMAGES if batch == DYNAMIC else batch
            )
            report.check = _measure(
                temporary,
                place,
                pixels if input_dtype == "uint8" else prepared,
                {"Flax": _answers(model, output, place, prepared)}
                | {name: run(prepared) for name, run in (references or {}).items()},
                metadata["dtype"],
            )
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(_member(CHECK), json.dumps(report.check, indent=2))
            seconds["check"] = time.perf_counter() - started
        report.bytes = temporary.stat().st_size
    return report


def check_platforms(platforms: Iterable[str]) -> tuple[str, ...]:
    """The platforms, each once; InputError if JAX knows one by another name or not at all."""
    names = (platforms,) if isinstance(platforms, str) else tuple(dict.fromkeys(platforms))
    wrong = [name for name in names if name not in PLATFORMS]
    if wrong or not names:
        hint = " A GPU of NVIDIA's is 'cuda'." if "gpu" in wrong else ""
        raise InputError(
            f"`platforms` must be some of {', '.join(PLATFORMS)}; given "
            f"{', '.join(map(repr, wrong)) or 'none'}.{hint}"
        )
    return names


def versions(*names: str) -> dict[str, str]:
    """Version by name, of what is installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def random_pixels(
    processor: BaseImageProcessor, shape: tuple[int, int, int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures (B, C, H, W), uint8, and the same as the processor makes of them, float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    prepared = processor(
        pixels,
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        input_data_format="channels_first",
        return_tensors="np",
    )["pixel_values"]
    return pixels, prepared.astype(np.float32)


# -- the program


def _check_output(model: Any, output: str) -> None:
    head, name = model.head, type(model).__name__
    if output not in ("logits", "features"):
        raise InputError(f"`output` must be 'logits' or 'features'; given {output!r}.")
    if output == "logits" and head not in ("classifier", "teacher"):
        raise InputError(
            f"{name} has no classifier, so there are no logits to export; export its features with "
            '--output features (in Python a base network and `output="features"`).'
        )
    if output == "features" and head is not None:
        raise InputError(
            f"`output` 'features' is for a base network, such as `FlaxAutoModel` gives; given a "
            f"{name}."
        )


def _program(model: Any, output: str, processor: BaseImageProcessor | None) -> Callable[..., Any]:
    """The function to export: flat parameters and images to logits or features."""
    arithmetic = _arithmetic(processor)

    def run(parameters: Mapping[str, jax.Array], pixel_values: jax.Array) -> jax.Array:
        return _outputs(model, output, _nested(parameters), arithmetic(pixel_values))

    return run


def _outputs(model: Any, output: str, params: Any, pixel_values: Any) -> jax.Array:
    found = model(
        pixel_values,
        params=params,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    )
    if output == "logits":
        return found.logits.astype(jnp.float32)  # (B, K)
    hidden = found.last_hidden_state.astype(jnp.float32)  # (B, S, D)
    config = model.config
    if config.use_cls_token:
        return hidden[:, 0]  # (B, D)
    return jnp.mean(hidden[:, config.num_prefix_tokens :], axis=1)  # (B, D)


def _arithmetic(processor: BaseImageProcessor | None) -> Callable[[jax.Array], jax.Array]:
    """Rescaling and normalising of pixels (B, C, H, W), float32."""
    if processor is None:
        return lambda pixels: pixels
    options = processor.to_dict()
    scale = options["rescale_factor"] if options.get("do_rescale") else 1.0
    mean, std = 0.0, 1.0
    if options.get("do_normalize"):
        mean, std = options["image_mean"], options["image_std"]
    mean, std = (np.asarray(x, np.float32).reshape(1, -1, 1, 1) for x in (mean, std))

    def run(pixels: jax.Array) -> jax.Array:
        return (pixels.astype(jnp.float32) * np.float32(scale) - mean) / std

    return run


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, jax.Array]:
    flat: dict[str, jax.Array] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}{_SEPARATOR}")
        else:
            flat[prefix + name] = jnp.asarray(value)
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(_SEPARATOR)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


@contextmanager
def _without_paths() -> Iterator[None]:
    """Have JAX leave the names of source files out of programs: they are this machine's."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


# -- the file


def _member(name: str) -> zipfile.ZipInfo:
    # Of a fixed date, so that the same model gives the same file.
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o644 << 16
    return member


def _write(
    path: Path, texts: Mapping[str, str], program: bytes, parameters: Mapping[str, Any]
) -> None:
    tensors = [as_tensor(name, array) for name, array in parameters.items()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, text in texts.items():
            archive.writestr(_member(name), text)
        archive.writestr(_member(PROGRAM), program)
        with archive.open(_member(PARAMETERS), "w", force_zip64=True) as stream:
            safetensors_file.write(stream, tensors, {"format": "flax"})


# -- the check


def _place_to_check(platforms: Sequence[str]) -> jax.Device:
    """Where to run the program and the model: JAX's default device, or else the CPU."""
    devices = [jax.devices()[0]]
    if devices[0].platform == "tpu":
        devices = []  # which one process holds, and the check is made in another
    try:
        devices.append(jax.devices("cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        pass
    for device in devices:
        if platform_of(device) in platforms:
            return device
    raise InputError(
        f"nothing here can run a program for {', '.join(platforms)} to check it; add cpu to "
        "--platforms (in Python `platforms`), or pass --no-check (`check=False`)."
    )


def _answers(model: Any, output: str, place: jax.Device, pixel_values: np.ndarray) -> np.ndarray:
    params, pixels = jax.device_put((model.params, pixel_values), place)
    return np.asarray(_outputs(model, output, params, pixels))


_LOADER = (
    "import sys, numpy\n"
    "from vit_flax.export import load\n"
    "answers = load(sys.argv[1])(numpy.load(sys.argv[2]))\n"
    "numpy.save(sys.argv[3], numpy.asarray(answers))\n"
    "sys.exit('the loader imported flax' if 'flax' in sys.modules else 0)\n"
)


def _measure(
    path: Path,
    place: jax.Device,
    pixels: np.ndarray,
    references: Mapping[str, np.ndarray],
    dtype: str,
) -> dict[str, Any]:
    """Run the file in a fresh process; what it gives against each reference.

    Raises:
        CheckpointError: it fails, or is further from the Flax model than the bound.
    """
    inputs, answers = path.with_name("pixels.npy"), path.with_name("answers.npy")
    np.save(inputs, pixels)
    platform = platform_of(place)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has taken its part
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    process = subprocess.run(
        [sys.executable, "-P", "-c", _LOADER, str(path), str(inputs), str(answers)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CheckpointError(
            f"the exported program cannot be run in a fresh process ({last[:300]}); nothing was "
            "written."
        )
    found = np.load(answers)
    check: dict[str, Any] = {
        "images": len(pixels),
        "platform": platform,
        "device": place.device_kind,
        "largest": float(np.abs(references["Flax"]).max()),
        "max_abs_error": {},
    }
    for name, wanted in references.items():
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"the exported program gives an array of shape {found.shape}, {name} one of "
                f"{wanted.shape}; nothing was written."
            )
        error = float(np.abs(found - wanted).max())
        check["max_abs_error"][name] = error
        bound = BOUNDS.get(dtype, BOUNDS["float32"]) * max(1.0, check["largest"])
        if name == "Flax" and not error <= bound:
            raise CheckpointError(
                f"the exported program differs from the model by {error:.3g}, and may by "
                f"{bound:.3g}; nothing was written. (Not a number means that the model's output is "
                "not finite.)"
            )
    return check
