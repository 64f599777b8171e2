"""What XLA's TPU compiler says of a network, on a machine that has no TPU.

The package libtpu holds the compiler that a TPU VM uses. It is given a description of the chips
instead of the chips, so nothing runs: a program that passes here compiles, fits and does the
arithmetic it should, but neither its numbers nor its time were seen.

A chip has one device in each of these topologies; every figure is of one chip.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.config import ViTConfig, is_timm
from vit_common.errors import InputError
from vit_common.flops import forward_flops
from vit_common.parameters import Head, parameter_shapes
from vit_common.presets import NAMES, preset
from vit_common.versions import versions as installed
from vit_convert.source import config_from_dict, open_source, read_config_file
from vit_flax.attention import compiled_for
from vit_flax.auto import FlaxAutoModelForImageClassification
from vit_flax.hlo import (
    collectives,
    custom_kernels,
    exchanges,
    float32_products,
    float64_operations,
    own_kernels,
    product_flops,
)
from vit_flax.last_words import first_line, is_out_of_memory
from vit_flax.sharding import (
    DATA,
    FSDP,
    TRAINING_AXES,
    batch_sharding,
    replicated,
    tree_shardings,
)
from vit_flax.training import TrainState, cross_entropy, make_step

FLOPS_BOUND = 0.03
"""Largest difference of a program's matrix products from the analytic count, as a share of it."""

DTYPES = ("bfloat16", "float16", "float32")


class Chip(NamedTuple):
    """A generation of TPU: the smallest topology the compiler takes, and one chip's figures."""

    topology: str
    hbm_gb: float
    bf16_tflops: float
    hbm_gb_per_second: float
    source: str


CHIPS: dict[str, Chip] = {
    "v5e": Chip("v5e:2x2", 16, 197, 819, "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("v5p:2x2x1", 95, 459, 2765, "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("v6e:2x2", 32, 918, 1640, "https://cloud.google.com/tpu/docs/v6e"),
}
"""The chips by name, with the peak figures that Google publishes; a GB is 10^9 bytes here."""


@dataclass(frozen=True)
class Check:
    """One assertion: its name, whether it holds, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Program:
    """One program compiled for one kind of chip.

    Attributes:
        chip: key of `CHIPS`.
        name: "forward" or "training step".
        batch: images on each chip.
        devices: chips of the mesh.
        seconds: time of compiling.
        analytic_flops: two for each multiply-add of `vit_common.flops`, on one chip.
        product_flops: of the matrix products in the optimized program, and those that the package's
            kernels say they do, less what they compute anew; None where another kernel hides some.
        flops: of all operations, by the compiler's cost analysis.
        bytes_accessed: by the same: what every operation reads and writes, VMEM included.
        argument_bytes, output_bytes, aliased_bytes, temporary_bytes, code_bytes: memory that the
            program takes; aliased are the outputs that take the place of arguments.
        collectives: how many of each kind there are.
        checks: the assertions.
    """

    chip: str
    name: str
    batch: int
    devices: int
    seconds: float
    analytic_flops: float
    product_flops: float | None
    flops: float
    bytes_accessed: float
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int
    collectives: dict[str, int]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all assertions hold."""
        return all(check.passed for check in self.checks)

    @property
    def compiled(self) -> bool:
        """Whether there is a program; if not, every figure is 0."""
        return self.flops > 0

    @property
    def memory_bytes(self) -> int:
        """HBM that the program needs, arguments included."""
        held = self.argument_bytes + self.output_bytes - self.aliased_bytes
        return held + self.temporary_bytes + self.code_bytes

    @property
    def flops_ratio(self) -> float:
        """All operations, to the analytic count of matrix products."""
        return self.flops / self.analytic_flops


@dataclass(frozen=True)
class TPUReport:
    """What `check` found.

    Attributes:
        model: name of the model.
        dtype: compute dtype; parameters are float32.
        versions: versions of jax, jaxlib, flax and libtpu.
        programs: one for each chip and kind.
    """

    model: str
    dtype: str
    versions: dict[str, str | None]
    programs: tuple[Program, ...]

    @property
    def passed(self) -> bool:
        """Whether every assertion of every program holds."""
        return all(program.passed for program in self.programs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TPUReport:
        """The report that `to_dict` wrote."""
        programs = tuple(
            Program(**{**row, "checks": tuple(Check(**check) for check in row["checks"])})
            for row in table["programs"]
        )
        return cls(table["model"], table["dtype"], dict(table["versions"]), programs)


def check(
    config_or_source: ViTConfig | str | os.PathLike,
    *,
    chips: Iterable[str] = ("v5e", "v5p", "v6e"),
    batch: int = 8,
    dtype: str = "bfloat16",
    training: bool = True,
    format: str | None = None,
    hub: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> TPUReport:
    """Compile a network for TPUs and check what the compiler says. Needs no weights and no TPU.

    Compiled are the forward pass of the image classifier and a training step (cross entropy,
    optax's AdamW, the old state donated), batches split over the chips and parameters, float32, on
    each. It takes a core one to several minutes a program, by depth.

    Asserted of each: it compiles, and fits in the chip's HBM; the floating point operations of its
    matrix products are within `FLOPS_BOUND` of the analytic count (of a training step: three times
    that of the forward pass, without the gradient of the pixels); no float64; no float32 matrix
    product if another dtype was asked for, but for those of positions; and of the forward
    pass: no collective.

    Args:
        config_or_source: a configuration, a folder, weights file or Hub name, or a preset's name
            where no file has that name.
        chips: keys of `CHIPS`.
        batch: images on each chip.
        dtype: compute dtype, one of `DTYPES`.
        training: whether to compile the training step too; needs optax.
        format: format of the weights, where the network must be detected from them.
        hub: options of the Hub.
        progress: called with a line of text before each program is compiled.

    Raises:
        InputError: libtpu or optax is missing, or an argument does not fit.
        ViTError: there is no such model, or it is refused.
    """
    chips = tuple(chips)
    unknown = [name for name in chips if name not in CHIPS]
    if unknown or not chips:
        raise InputError(f"`chips` must be some of {', '.join(CHIPS)}; given {chips!r}.")
    if batch < 1:
        raise InputError(f"`batch` must be at least 1; given {batch!r}.")
    if dtype not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}; given {dtype!r}.")
    require_compiler(training)
    config, teacher = network(config_or_source, format=format, hub=hub)
    if isinstance(config_or_source, ViTConfig):
        named = f"{config.model_type}, {config.num_hidden_layers} x {config.hidden_size}"
    else:
        named = os.fspath(config_or_source)
    programs = []
    with libtpu_environment():
        for chip in chips:
            for name in ("forward", "training step") if training else ("forward",):
                if progress is not None:
                    progress(f"compiling for {chip}: {name}, {batch} images on each chip, {dtype}")
                make = forward if name == "forward" else training_step
                mesh = chip_mesh(chip)
                built = make(config, mesh, batch=batch, dtype=dtype, teacher=teacher)
                programs.append(
                    check_program(*built, chip=chip, name=name, batch=batch, dtype=dtype)
                )
    return TPUReport(named, dtype, versions(), tuple(programs))


def require_compiler(training: bool = False) -> None:
    """Raise InputError unless libtpu, and for training optax, are installed."""
    needed = ("libtpu", "optax") if training else ("libtpu",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"checking without a TPU needs {' and '.join(missing)}; run: pip install "
            '"libtpu==0.0.42.*" optax'
        )


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide what is compiled."""
    return installed("jax", "jaxlib", "flax", "libtpu")


def network(
    config_or_source: ViTConfig | str | os.PathLike,
    *,
    format: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> tuple[ViTConfig, bool]:
    """The configuration of a model, and whether it has a distilled DeiT's two classifiers. For a
    model on the Hub, weights are fetched only if its `config.json` does not say what it is."""
    if isinstance(config_or_source, ViTConfig):
        return config_or_source, _has_teacher(config_or_source)
    source = os.fspath(config_or_source)
    if source in NAMES and not Path(source).exists():
        return preset(source, num_labels=1000), False
    table = read_config_file(source, **(hub or {}))
    if table is not None and table.get("model_type") and not is_timm(table):
        config = config_from_dict(table)
        return config, _has_teacher(config)
    with open_source(source, format=format, **(hub or {})) as opened:
        return opened.config, opened.head == "teacher"


def _has_teacher(config: ViTConfig) -> bool:
    return any("WithTeacher" in name for name in config.architectures or ())


@contextmanager
def libtpu_environment() -> Iterator[None]:
    """Keep libtpu from asking the network what machine this is, and from writing logs.

    libtpu reads these variables when it is loaded; what was set before stays, and the rest is
    taken away again.
    """
    added = {name: value for name, value in LIBTPU_VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


LIBTPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so nothing is fought over
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that exists: asked for, but not used here
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def chip_mesh(chip: str, devices: int | None = None) -> jax.sharding.Mesh:
    """A mesh with one axis, "data", over the first devices of the chip's topology; None takes all.

    Raises:
        InputError: the compiler does not know the chip.
    """
    found = _devices(CHIPS[chip].topology)
    return jax.sharding.Mesh(np.array(found[:devices]), (DATA,))


def training_mesh(topology: str, data: int, fsdp: int) -> jax.sharding.Mesh:
    """A mesh with the axes of training over all devices of a topology such as "v5e:4x4".

    Args:
        topology: as libtpu names it.
        data: size of the axis over which the batch alone is split.
        fsdp: size of the axis over which parameters and moments are split too.

    Raises:
        InputError: the compiler does not know the topology, or the axes do not fill it.
    """
    found = np.array(_devices(topology))
    if data * fsdp != len(found):
        raise InputError(
            f"the topology {topology} has {len(found)} chips; given axes of {data} x {fsdp}."
        )
    return jax.sharding.Mesh(found.reshape(data, fsdp, 1), TRAINING_AXES)


def _devices(topology: str) -> list[Any]:
    """The devices of a topology that is not here."""
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise InputError(
            f"libtpu {metadata.version('libtpu')} does not take the topology {topology}: "
            f"{first_line(error)}"
        ) from error


# -- programs


class Built(NamedTuple):
    """A jitted function, its arguments, and the operations of its matrix products on one chip."""

    jitted: Any
    arguments: tuple[Any, ...]
    analytic_flops: float
    devices: int
    may_communicate: bool


def _model(
    config: ViTConfig, dtype: str, teacher: bool, kernel: str, scan_layers: bool = False
) -> Any:
    auto = FlaxAutoModelForImageClassification
    cls = auto.teacher if teacher else auto.class_for(config)
    return cls(
        config, dtype=dtype, _do_init=False, attn_implementation=kernel, scan_layers=scan_layers
    )


def _pixels(config: ViTConfig, batch: int, dtype: str) -> jax.ShapeDtypeStruct:
    shape = (batch, config.num_channels, *config.image_height_width)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def forward(
    config: ViTConfig,
    mesh: jax.sharding.Mesh,
    *,
    batch: int,
    dtype: str,
    teacher: bool = False,
    attn_implementation: str = "auto",
    front_tokens: int | None = None,
) -> Built:
    """Logits of `batch` images on each device; `front_tokens` as `with_front_tokens` takes them."""
    everywhere, split = replicated(mesh), batch_sharding(mesh)
    model = _model(config, dtype, teacher, attn_implementation).with_front_tokens(front_tokens)
    jitted = jax.jit(
        lambda params, pixel_values: model(pixel_values, params=params, return_dict=True).logits,
        in_shardings=(everywhere, split),
        out_shardings=split,
    )
    arguments = (model.params_shape_tree, _pixels(config, batch * mesh.size, dtype))
    head: Head = "teacher" if teacher else "classifier"
    flops = batch * forward_flops(config, head, front_tokens=front_tokens)
    return Built(jitted, arguments, flops, mesh.size, may_communicate=False)


def training_step(
    config: ViTConfig,
    mesh: jax.sharding.Mesh,
    *,
    batch: int,
    dtype: str,
    teacher: bool = False,
    attn_implementation: str = "auto",
    remat: str | None = None,
    scan_layers: bool = False,
) -> Built:
    """One step of AdamW on `batch` images on each device; gradients are summed over them.

    Args:
        config: of the network.
        mesh: with any of the axes of training; parameters and moments lie on it by the table in
            `vit_flax.sharding`.
        batch: images on each device.
        dtype: compute dtype.
        teacher: whether it is a distilled DeiT with two classifiers.
        attn_implementation: see `vit_flax.attention`.
        remat: what a block keeps for its gradient, as `enable_gradient_checkpointing` takes it;
            None keeps everything.
        scan_layers: compile one block and run it for all.
    """
    import optax

    split = batch_sharding(mesh)
    model = _model(config, dtype, teacher, attn_implementation, scan_layers=scan_layers)
    if remat is not None:
        model.enable_gradient_checkpointing(remat)
    optimizer = optax.adamw(1e-3)
    step = make_step(model, cross_entropy(), optimizer, mesh=mesh)
    state = jax.eval_shape(
        lambda params: TrainState.create(model, optimizer, params=params), model.params_shape_tree
    )
    total = batch * mesh.size
    images = _pixels(config, total, dtype)
    labels = jax.ShapeDtypeStruct((total,), jnp.int32)

    def on(leaf: Any, place: jax.sharding.NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    arguments = (
        jax.tree.map(on, state, tree_shardings(mesh, state)),
        {"pixel_values": on(images, split), "labels": on(labels, split)},
    )
    flops = 3 * forward_flops(config, "teacher" if teacher else "classifier")
    patch = math.prod(config.patch_height_width) * config.num_channels
    flops -= 2 * config.num_patches * patch * config.hidden_size  # the pixels need no gradient
    return Built(step, arguments, batch * flops, mesh.size, may_communicate=True)


def exchange_check(hlo: str, config: ViTConfig, mesh: jax.sharding.Mesh) -> Check:
    """Whether the communication of a training step is what its mesh calls for: sums of gradients
    over "data"; and over "fsdp" parameters gathered, none twice for one pass and nothing larger
    than a parameter, and gradients scattered as they are summed. Nothing else is moved.

    Args:
        hlo: text of the optimized program.
        config: of the network.
        mesh: that it was compiled for.
    """
    found = exchanges(hlo)
    kinds = Counter(each.kind for each in found)
    gathers = [each for each in found if each.kind.startswith("all-gather")]
    expected = {"all-reduce"}
    if mesh.shape.get(FSDP, 1) > 1:
        expected |= {"all-gather", "all-gather ring", "reduce-scatter", "reduce-scatter ring"}
    sizes = [math.prod(shape) for shape in parameter_shapes(config, "classifier").values()]
    most = sum(size > config.hidden_size for size in sizes)  # arrays that are split
    passed = set(kinds) <= expected and len(gathers) <= 2 * most
    passed = passed and all(each.elements <= max(sizes) for each in gathers)
    if mesh.shape.get(FSDP, 1) > 1:
        passed = passed and bool(gathers) and any("reduce-scatter" in kind for kind in kinds)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return Check("collectives", passed, said or "none")


def check_program(
    jitted: Any,
    arguments: tuple[Any, ...],
    analytic_flops: float,
    devices: int,
    may_communicate: bool,
    *,
    chip: str,
    name: str,
    batch: int,
    dtype: str,
    more: Callable[[str], Check] | None = None,
) -> Program:
    """Compile a jitted function of shapes and check what comes out.

    Args:
        jitted: its shardings name the devices.
        arguments: shapes and dtypes that it is called with.
        analytic_flops: of its matrix products on one device; 0 leaves that check out.
        devices: how many there are.
        may_communicate: whether collectives are expected.
        chip, name, batch: for the report.
        dtype: of matrix products; with "float32" those may be float32.
        more: one more check, of the optimized program's text.
    """
    with compiled_for("tpu"):
        lowered = jitted.lower(*arguments)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        exhausted = is_out_of_memory(error)
        failed = Check("fits" if exhausted else "compiles", False, first_line(error))
        seconds = time.perf_counter() - start
        empty: tuple[Any, ...] = (None, 0.0, 0.0, 0, 0, 0, 0, 0, {}, (failed,))
        return Program(chip, name, batch, devices, seconds, analytic_flops, *empty)
    seconds = time.perf_counter() - start

    text = compiled.as_text()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    hidden = custom_kernels(text) - len(own_kernels(text))
    counted = None if hidden else product_flops(text)
    found = collectives(text)
    program = Program(
        chip=chip,
        name=name,
        batch=batch,
        devices=devices,
        seconds=seconds,
        analytic_flops=analytic_flops,
        product_flops=counted,
        flops=float(cost["flops"]),
        bytes_accessed=float(cost["bytes accessed"]),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=found,
        checks=(),
    )
    limit = CHIPS[chip].hbm_gb
    used = program.memory_bytes / 1e9
    checks = [
        Check("compiles", True, f"in {seconds:.0f} s"),
        Check("fits", used <= limit, f"{used:.2f} of {limit:g} GB"),
    ]
    if analytic_flops:
        # What another's kernel does is not in the text; the total then stands for the products.
        ratio = (program.flops if counted is None else counted) / analytic_flops
        what = "all operations" if counted is None else "matrix products"
        checks.append(
            Check(
                "flops",
                abs(ratio - 1.0) <= FLOPS_BOUND,
                f"{what} {ratio:.4f} of the analytic count",
            )
        )
    wide = float64_operations(lowered.as_text(), text)
    checks.append(Check("no float64", not wide, _listed(wide) or "none"))
    if dtype != "float32":
        exact = float32_products(text)
        checks.append(Check("no float32 product", not exact, _listed(exact) or "none"))
    if more is not None:
        checks.append(more(text))
    if not may_communicate:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.items())
        checks.append(Check("no collective", not found, kinds or "none"))
    return Program(**{**vars(program), "checks": tuple(checks)})


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
