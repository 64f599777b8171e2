"""`export`: a model as one file with a program that JAX runs on other machines, without Flax and
without this package's networks. `load` gives it back; `vit_flax.export.read` says what is in the
file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.errors import CheckpointError, InputError
from vit_common.exports import (
    DYNAMIC,
    Export,
    Reference,
    check_batch,
    check_output,
    measure,
    random_pixels,
    versions,
)
from vit_common.features import features_pool, pooled_tokens
from vit_common.files.containers import safetensors_file
from vit_common.files.containers.tensor import as_tensor
from vit_common.files.replace import check_target, staged
from vit_common.images.predictions import Prediction
from vit_common.images.processor import BaseImageProcessor
from vit_common.versions import PACKAGE
from vit_flax.attention import compiled_for
from vit_flax.export.read import (
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
from vit_flax.pixels import normalize

__all__ = ["DYNAMIC", "Export", "ExportedModel", "Prediction", "export", "load"]

_SEPARATOR = "/"
_IMAGES = 3


def disabled_checks() -> Sequence[Any]:
    """`jax.export.DisabledSafetyCheck`s of kernels whose custom calls JAX does not promise to keep
    stable: the one place to name them."""
    # XLA's own way to say how an array lies in a TPU's memory (`vit_flax.layers.row_major`).
    return (jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint"),)


def export(
    model: Any,
    path: str | PathLike,
    *,
    image_processor: BaseImageProcessor | None = None,
    platforms: Iterable[str] = ("cpu", "cuda", "tpu"),
    batch: int | Literal["dynamic"] = "dynamic",
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
        image_processor: prepares the images; None means the Hub's defaults for a ViT. It decides
            the image size where the family takes any.
        platforms: platforms that the program is lowered for: "cpu", "cuda", "rocm", "tpu".
        batch: number of images in a call; "dynamic" for any number.
        output: "logits" of a classifier; "features", (B, D), of a base network: the class token
            after the final norm, or the mean of the patches where there is no such token.
        input_dtype: "uint8" takes 8-bit pixels, resized and cropped, which the program rescales
            and normalises.
        check: load the file in a fresh process and compare it with the model, on random pixels.
        references: name -> another function to compare it with; called on `pixel_values`
            (B, C, H, W), float32 and normalised.
        force: overwrite the file.

    Raises:
        InputError: an option is wrong, or nothing here can run the program to check it.
        ConfigError: model and preprocessing contradict each other.
        ExistingFileError: the file is there already.
        MissingFileError: it cannot be written.
        CheckpointError: the exported program gives other numbers; nothing was written.

    Example:
        >>> model = FlaxViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
        >>> export(model, "vit.jaxexport", batch=8)
        >>> load("vit.jaxexport").classify("cat.jpg", top_k=1)[0].label
        'Egyptian cat'
    """
    path = Path(path)
    platforms = check_platforms(platforms)
    check_batch(batch)
    if input_dtype not in ("float32", "uint8"):
        raise InputError(f"`input_dtype` must be 'float32' or 'uint8'; given {input_dtype!r}.")
    check_output(type(model).__name__, model.head, output)
    check_target(path, force=force)
    place = check_place(platforms) if check else None
    jax_export = serializer()

    from flax.traverse_util import flatten_dict  # not above: `load` runs without Flax

    from vit_flax.inference import ImageClassifier

    classifier = ImageClassifier(model, image_processor)
    config, processor = model.config, classifier.image_processor
    shape = (config.num_channels, *classifier.image_size)
    run = _program(model, output, processor if input_dtype == "uint8" else None)
    flat = flatten_dict(model.network_params, sep=_SEPARATOR)
    parameters = {name: jnp.asarray(array) for name, array in flat.items()}

    started = time.perf_counter()
    rows = jax_export.symbolic_shape("b")[0] if batch == DYNAMIC else batch
    with _without_paths(), compiled_for(*platforms):
        exported = jax_export.export(
            jax.jit(run), platforms=platforms, disabled_checks=disabled_checks()
        )(
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in parameters.items()},
            jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(input_dtype)),
        )
        program = bytes(exported.serialize())
    seconds = time.perf_counter() - started

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
        "program_bytes": len(program),
        "calling_convention_version": exported.calling_convention_version,
        "labels": labels if output == "logits" else [],
        "several": classifier.several,
        "versions": versions(PACKAGE, "jax", "jaxlib", "flax"),
    }
    report = Export(path, 0, metadata, None, {"lowering": seconds})
    with staged(path) as temporary:
        started = time.perf_counter()
        texts = {
            METADATA: json.dumps(metadata, indent=2, ensure_ascii=False),
            CONFIG: config.to_json_string(),
            PROCESSOR: processor.to_json_string(),
        }
        _write(temporary, texts, program, parameters)
        report.seconds["writing"] = time.perf_counter() - started
        if place is not None:
            started = time.perf_counter()
            count = batch if isinstance(batch, int) else _IMAGES
            pixels, prepared = random_pixels(processor, shape, count)
            given = pixels if input_dtype == "uint8" else prepared
            wanted = {"Flax": _answers(model, output, place, prepared)}
            wanted |= {name: reference(prepared) for name, reference in (references or {}).items()}
            report.check = {
                "platform": platform_of(place),
                "device": place.device_kind,
                **measure(_run_afresh(temporary, place, given), wanted, metadata["dtype"]),
            }
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(_member(CHECK), json.dumps(report.check, indent=2))
            report.seconds["check"] = time.perf_counter() - started
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


# -- the program


def _program(model: Any, output: str, processor: BaseImageProcessor | None) -> Callable[..., Any]:
    """The function to export: flat parameters and images to logits or features."""
    from flax.traverse_util import unflatten_dict

    def run(parameters: Mapping[str, jax.Array], pixel_values: jax.Array) -> jax.Array:
        if processor is not None:
            pixel_values = normalize(pixel_values, processor)
        return _outputs(model, output, unflatten_dict(parameters, sep=_SEPARATOR), pixel_values)

    return run


def _outputs(model: Any, output: str, params: Any, pixel_values: Any) -> jax.Array:
    front = model.head_tokens
    if output == "features" and features_pool(model.config) == "mean":
        front = None  # the mean of the patches
    found = model.with_front_tokens(front)(
        pixel_values,
        params=params,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    )
    if output == "logits":
        return found.logits.astype(jnp.float32)  # (B, K)
    hidden = found.last_hidden_state.astype(jnp.float32)  # (B, S, D)
    return pooled_tokens(hidden, model.config)  # (B, D)


@contextmanager
def _without_paths() -> Iterator[None]:
    """Keep the names of this machine's source files out of programs."""
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
            safetensors_file.write(cast(BinaryIO, stream), tensors, {"format": "flax"})


# -- the check


def check_place(platforms: Sequence[str]) -> jax.Device:
    """The device to compare a program with its model on: JAX's default, or else the CPU.

    Raises:
        InputError: there is none of these platforms here.
    """
    devices = [jax.devices()[0]]
    if devices[0].platform == "tpu":
        devices = []  # which one process holds, and the check is made in another
    with suppress(RuntimeError):  # JAX_PLATFORMS may leave it out
        devices.append(jax.devices("cpu")[0])
    for device in devices:
        if platform_of(device) in platforms:
            return device
    raise InputError(
        f"nothing here can run a program for {', '.join(platforms)} to check it; add cpu to "
        "--platforms (in Python `platforms`), or pass --no-check (`check=False`)."
    )


def _answers(model: Any, output: str, place: jax.Device, pixel_values: np.ndarray) -> np.ndarray:
    params, pixels = jax.device_put((model.network_params, pixel_values), place)
    return np.asarray(_outputs(model, output, params, pixels))


_LOADER = (
    "import sys, numpy\n"
    "from vit_flax.export import load\n"
    "answers = load(sys.argv[1])(numpy.load(sys.argv[2]))\n"
    "numpy.save(sys.argv[3], numpy.asarray(answers))\n"
    "sys.exit('the loader imported flax' if 'flax' in sys.modules else 0)\n"
)


def _run_afresh(path: Path, place: jax.Device, pixels: np.ndarray) -> np.ndarray:
    """The outputs of the file in a fresh process.

    Raises:
        CheckpointError: it cannot be loaded or run there.
    """
    inputs, answers = path.with_name("pixels.npy"), path.with_name("answers.npy")
    np.save(inputs, pixels)
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": platform_of(place),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has taken its part
        "PYTHONPATH": os.pathsep.join(paths),
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
    return np.load(answers)
