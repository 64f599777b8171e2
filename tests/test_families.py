"""DeiT, BEiT and DINOv2 with and without registers, and ViT's extensions: both twins.

References are Transformers 4.57.6's PyTorch models with every parameter drawn at random, its Flax
models of BEiT and DINOv2 where those are right, and its configurations. Weights reach our models
through the references' own files, so names and layouts are compared too.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from networks import flax_twin, images, random_weights, randomize, torch_twin
from safetensors.numpy import load_file
from tolerances import BOUNDS

import vit_flax
import vit_torch
from vit_common.config import CONFIG_CLASSES, AutoConfig, ViTConfig
from vit_common.errors import CheckpointError, ConfigError, InputError
from vit_common.files.containers.tensor import as_tensor
from vit_common.positions import relative_position_index
from vit_convert.formats import TREE
from vit_convert.rules import to_canonical
from vit_torch.parity import compare, difference
from vit_torch.pretrained import to_numpy

# Narrower and with fewer patches than `networks.SMALL`: there are many of them here.
DINO = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
SMALL = {**DINO, "intermediate_size": 36}

NATIVE, LARGER, SMALLER = (16, 16), (24, 24), (8, 8)
# As many patches as the native size, in another shape.
WIDE = (8, 32)

BIASES = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
POSITIONS = {"use_absolute_position_embeddings": True}


class Case(NamedTuple):
    """A model's class, what differs from the small configuration, and sizes besides the native."""

    name: str
    fields: dict[str, Any]
    sizes: tuple[tuple[int, int], ...] = ()


ALL_SIZES = (LARGER, SMALLER, WIDE)
CASES = {
    "deit": Case("DeiTModel", {}, ALL_SIZES),
    "deit, no qkv bias": Case("DeiTModel", {"qkv_bias": False, "pooler_output_size": 30}),
    "deit classifier": Case("DeiTForImageClassification", {}),
    "deit teacher": Case("DeiTForImageClassificationWithTeacher", {}, (WIDE,)),
    # No other size: the reference's decoder and its loss take the grid for a square one.
    "deit decoder": Case("DeiTForMaskedImageModeling", {"encoder_stride": 4}),
    "beit, no positions": Case("BeitModel", {}),
    "beit, biases of a block": Case("BeitModel", {"use_relative_position_bias": True}, (WIDE,)),
    "beit, shared biases": Case(
        "BeitModel",
        {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        (WIDE,),
    ),
    "beit, all positions": Case(
        "BeitModel", {**BIASES, **POSITIONS, "use_mask_token": True}, ALL_SIZES
    ),
    "beit, no layer scale": Case(
        "BeitModel", {"use_relative_position_bias": True, "layer_scale_init_value": 0.0}
    ),
    "beit classifier": Case("BeitForImageClassification", {"use_relative_position_bias": True}),
    "beit classifier, class token": Case(
        "BeitForImageClassification", {**POSITIONS, "use_mean_pooling": False}
    ),
    "beit tokens": Case(
        "BeitForMaskedImageModeling",
        {**BIASES, "use_mask_token": True, "use_mean_pooling": False, "vocab_size": 11},
        (WIDE,),
    ),
    "beit tokens, no final norm": Case(
        "BeitForMaskedImageModeling", {"use_mask_token": True, "vocab_size": 11}
    ),
    "dinov2": Case("Dinov2Model", {}, ALL_SIZES),
    "dinov2, gated": Case("Dinov2Model", {"use_swiglu_ffn": True, "use_mask_token": False}),
    "dinov2, no qkv bias": Case("Dinov2Model", {"qkv_bias": False, "mlp_ratio": 2}),
    "dinov2 classifier": Case("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
    "registers": Case("Dinov2WithRegistersModel", {}, ALL_SIZES),
    "no registers": Case("Dinov2WithRegistersModel", {"num_register_tokens": 0}),
    "one register": Case("Dinov2WithRegistersModel", {"num_register_tokens": 1, "qkv_bias": False}),
    "two registers": Case(
        "Dinov2WithRegistersForImageClassification",
        {"num_register_tokens": 2, "mlp_ratio": 2},
        (WIDE,),
    ),
    "dinov3": Case("DINOv3ViTModel", {"num_register_tokens": 4}, (WIDE,)),
    "dinov3, gated": Case(
        "DINOv3ViTModel",
        {
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "key_bias": True,
            "num_register_tokens": 1,
        },
    ),
    "dinov3, few biases": Case(
        "DINOv3ViTModel",
        {
            "query_bias": False,
            "proj_bias": False,
            "mlp_bias": False,
            "rope_theta": 50.0,
            "num_register_tokens": 2,
        },
    ),
    "three registers, gated": Case(
        "Dinov2WithRegistersForImageClassification",
        {"num_register_tokens": 3, "use_swiglu_ffn": True},
    ),
}
RUNS = [
    pytest.param(name, size, marks=[] if size == NATIVE else pytest.mark.slow)
    for name, case in CASES.items()
    for size in (NATIVE, *case.sizes)
]
FAMILIES = ("DeiT", "Beit", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT")


def family_of(class_name: str) -> str:
    return class_name.split("For")[0].removesuffix("Model")


def reference_config(case: Case, attention: str = "eager"):
    family = family_of(case.name)
    small = DINO if family.startswith("Dinov2") else SMALL
    config = getattr(transformers, f"{family}Config")(**{**small, **case.fields})
    config._attn_implementation = attention
    return config


def make_reference(case: Case, attention: str = "eager", dtype=torch.float64) -> Any:
    """Transformers' model; no parameter is zero, one or equal to another, activations are of unit
    scale."""
    model = getattr(transformers, case.name)(reference_config(case, attention))
    if hasattr(model, "rope_embeddings"):  # frequencies of float32 whatever the dtype
        width = model.rope_embeddings.head_dim
        powers = torch.arange(0, 1, 4 / width, dtype=torch.float64)
        model.rope_embeddings.inv_freq = model.config.rope_theta**-powers
    return randomize(model.to(torch.float64)).to(dtype)


def one_block(case: Case, blocks: int = 1) -> Case:
    return case._replace(fields={**case.fields, "num_hidden_layers": blocks})


def load_twins(directory: Path, name: str, dtype: str = "float64", **kwargs: Any) -> tuple:
    """Our Flax model and its twin, from a directory."""
    ours = getattr(vit_flax, f"Flax{name}").from_pretrained(
        directory,
        dtype=getattr(jnp, dtype),
        param_dtype=getattr(jnp, dtype),
        precision="highest",
        **kwargs,
    )
    twin = getattr(vit_torch, name).from_pretrained(
        directory, dtype=getattr(torch, dtype), **kwargs
    )
    return ours, twin


@contextlib.contextmanager
def references_in_float64(monkeypatch):
    """Transformers takes the softmax, and resamples DINOv2's positions, in float32 whatever the
    dtype; here the name those casts use stands for float64. Nothing else of them is touched."""

    class Torch:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with monkeypatch.context() as patch:
        for family in ("deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit"):
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            patch.setattr(module, "torch", Torch())
        yield


def random_images(size, batch: int = 3, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, *size)).astype(dtype)


def patch_mask(size, batch: int = 3) -> np.ndarray:
    mask = np.random.default_rng(5).integers(0, 2, (batch, size[0] // 4 * (size[1] // 4)))
    mask[:, 0], mask[:, 1] = 0, 1
    return mask.astype(bool)


def inputs_of(case: Case, config, size) -> dict[str, np.ndarray]:
    """Everything the model takes but the images, as arrays."""
    inputs: dict[str, Any] = {}
    if "Masked" in case.name or (case.name.endswith("Model") and config.use_mask_token):
        inputs["bool_masked_pos"] = patch_mask(size)
    rng = np.random.default_rng(3)
    if case.name == "BeitForMaskedImageModeling":
        masked = int(inputs["bool_masked_pos"].sum())
        inputs["labels"] = rng.integers(0, config.vocab_size, masked)
    elif case.name.endswith("Classification"):
        inputs["labels"] = np.array([4, 0, 2])
    return inputs


def options_of(case: Case, size) -> dict[str, Any]:
    """DeiT alone has to be asked to take another size."""
    return {"interpolate_pos_encoding": True} if size != NATIVE and "DeiT" in case.name else {}


ALL = {"output_hidden_states": True, "output_attentions": True}


def as_torch(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in inputs.items()}


def stages(output) -> dict[str, np.ndarray]:
    """Every array of an output, by name."""
    found: dict[str, Any] = {}
    for name, value in output.items():
        if isinstance(value, (tuple, list)):
            found |= {f"{name} {i}": item for i, item in enumerate(value)}
        elif value is not None:
            found[name] = value
    return {
        name: to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        for name, value in found.items()
    }


def check_stages(got, want, bound_name: str) -> None:
    """Both have the same stages and each agrees."""
    got, want = stages(got), stages(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        stage = difference(name, got[name], value)
        assert stage.max_abs <= BOUNDS[bound_name], f"{stage} is over {BOUNDS[bound_name]}"


# -- against Transformers' PyTorch models


# Transformers stores no registers as an array without entries, which a file of ours leaves out.
NO_REGISTERS = pytest.mark.filterwarnings("ignore:.*not used. embeddings.register_tokens")


@NO_REGISTERS
@pytest.mark.parametrize(("name", "size"), RUNS, ids=lambda value: str(value).replace(" ", ""))
def test_every_stage_against_the_torch_reference(name, size, tmp_path, monkeypatch):
    # What another size or a variant changes is there in one block, which compiles faster than two.
    blocks = 2 if size == NATIVE and CASES[name].sizes == ALL_SIZES else 1
    case = one_block(CASES[name], blocks)
    reference = make_reference(case)
    reference.save_pretrained(tmp_path)
    x, options = random_images(size), options_of(case, size)
    with jax.enable_x64(True):
        ours, twin = load_twins(tmp_path, case.name)
        inputs = inputs_of(case, ours.config, size)
        given = as_torch(inputs)
        if case.name == "DeiTForMaskedImageModeling":
            # As numbers: of a bool mask the reference takes the sum plus 1e-5 in float32.
            given["bool_masked_pos"] = given["bool_masked_pos"].double()
        with torch.no_grad(), references_in_float64(monkeypatch):
            want = reference(torch.tensor(x), **given, **options, **ALL)
        with torch.no_grad():
            got = twin(torch.tensor(x), **as_torch(inputs), **options, **ALL)
        check_stages(got, want, "reference float64")
        check_stages(ours(x, **inputs, **options, **ALL), want, "reference float64")
    assert len(want.hidden_states) == 1 + blocks
    assert len(want.attentions) == blocks
    assert ("labels" in inputs) == (getattr(want, "loss", None) is not None) or "deit d" in name


@pytest.mark.parametrize("name", ["deit", "beit, all positions", "dinov2", "registers"])
def test_head_mask_against_the_torch_reference(name, tmp_path, monkeypatch):
    case = one_block(CASES[name])
    reference = make_reference(case)
    reference.save_pretrained(tmp_path)
    x = random_images(NATIVE)
    mask = np.array([0.0, 0.5, 1.0])
    with jax.enable_x64(True):
        ours, twin = load_twins(tmp_path, case.name)
        with torch.no_grad(), references_in_float64(monkeypatch):
            want = reference(torch.tensor(x), head_mask=torch.tensor(mask), **ALL)
        with torch.no_grad():
            got = twin(torch.tensor(x), head_mask=torch.tensor(mask), **ALL)
        check_stages(got, want, "reference float64")
        check_stages(ours(x, head_mask=mask, **ALL), want, "reference float64")


@NO_REGISTERS
@pytest.mark.parametrize("name", CASES)
def test_the_twins_kernel_against_the_references(name, tmp_path, monkeypatch):
    """Nothing patched but DINOv3's rotation, of float32: "sdpa" on both sides, which no one asks
    for attentions. In float32 also at another size."""
    case = CASES[name]
    other = NATIVE if name == "deit decoder" else WIDE
    for dtype, size in (("float64", NATIVE), ("float32", other)):
        reference = make_reference(case, "sdpa", getattr(torch, dtype))
        reference.save_pretrained(tmp_path / dtype)
        twin = getattr(vit_torch, case.name).from_pretrained(
            tmp_path / dtype, dtype=getattr(torch, dtype)
        )
        x = torch.tensor(random_images(size, dtype=dtype))
        exact = dtype == "float64" and "dinov3" in name
        patched = references_in_float64(monkeypatch) if exact else contextlib.nullcontext()
        with torch.no_grad(), patched:
            want = reference(x, output_hidden_states=True, **options_of(case, size))
        with torch.no_grad():
            got = twin(x, output_hidden_states=True, **options_of(case, size))
        check_stages(got, want, f"reference {dtype}")


@pytest.mark.parametrize("name", ["deit", "deit classifier"])
def test_a_grid_that_is_not_square(name, tmp_path, monkeypatch):
    """DeiT alone: Transformers takes the side of BEiT's and DINOv2's grids for the root of their
    number, and reads BEiT's tables with height and width exchanged."""
    case = one_block(CASES[name]._replace(fields={"image_size": (12, 20)}))
    reference = make_reference(case)
    reference.save_pretrained(tmp_path)
    x = random_images((12, 20))
    with jax.enable_x64(True):
        ours, twin = load_twins(tmp_path, case.name)
        with torch.no_grad(), references_in_float64(monkeypatch):
            want = reference(torch.tensor(x), **ALL)
        with torch.no_grad():
            check_stages(twin(torch.tensor(x), **ALL), want, "reference float64")
        check_stages(ours(x, **ALL), want, "reference float64")


@pytest.mark.parametrize("name", ["deit decoder", "beit, all positions", "registers"])
def test_twins_agree_where_the_reference_has_no_answer(name):
    """Grids that are not square, and DeiT's decoder at another size."""
    case = CASES[name]
    family = family_of(case.name)
    image_size = NATIVE if "decoder" in name else (12, 20)
    small = DINO if family.startswith("Dinov2") else SMALL
    config = getattr(vit_torch, f"{family}Config")(
        **{**small, **case.fields, "image_size": image_size, "num_hidden_layers": 1}
    )
    ours_class, twin_class = getattr(vit_flax, f"Flax{case.name}"), getattr(vit_torch, case.name)
    weights = random_weights(config, ours_class.head)
    with jax.enable_x64(True):
        report = compare(
            flax_twin(ours_class, config, weights, jnp.float64),
            torch_twin(twin_class, config, weights, torch.float64),
            random_images(WIDE),
            bool_masked_pos=patch_mask(WIDE),
            interpolate_pos_encoding=True,
        )
    assert report.first_over(BOUNDS["twins float64"]) is None, report.largest


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2), (1, 3)])
def test_relative_position_index_against_the_reference(grid):
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    reference = BeitRelativePositionBias(reference_config(CASES["beit, no positions"]), grid)
    want = reference.generate_relative_position_index(grid).numpy()
    np.testing.assert_array_equal(relative_position_index(grid), want)


# -- against Transformers' Flax models

FLAX_RUNS = {
    "all positions": Case("BeitModel", {**BIASES, **POSITIONS, "use_mask_token": True}),
    "class token pooled": Case("BeitModel", {**POSITIONS, "use_mean_pooling": False}),
    "beit classifier": Case("BeitForImageClassification", {**BIASES}),
    "beit tokens": CASES["beit tokens"],
    # It multiplies the factors by `layerscale_value` twice over; here that is one.
    "dinov2": Case("Dinov2Model", {}),
    "gated": Case("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
}


def flax_outputs(model, x, params, **inputs: Any) -> Any:
    """What a Flax model gives, compiled, its products at full precision."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: model(x, params=p, **inputs, **ALL))(params)


@pytest.mark.parametrize("name", FLAX_RUNS)
def test_against_the_flax_reference_through_its_files(name, tmp_path):
    """Ours writes, theirs reads and agrees; theirs writes, both twins read the same bits."""
    case = FLAX_RUNS[name] if name == "all positions" else one_block(FLAX_RUNS[name])
    make_reference(case, dtype=torch.float32).save_pretrained(tmp_path / "torch")
    ours, twin = load_twins(tmp_path / "torch", case.name, "float32")
    ours.save_pretrained(tmp_path / "ours", to="flax")
    twin.save_pretrained(tmp_path / "twin", to="flax")
    reference_class = getattr(transformers, f"Flax{case.name}")
    tree = msgpack_restore((tmp_path / "ours" / "flax_model.msgpack").read_bytes())
    assert (
        tree.keys()
        == msgpack_restore((tmp_path / "twin" / "flax_model.msgpack").read_bytes()).keys()
    )
    reference, params = reference_class.from_pretrained(tmp_path / "ours", _do_init=False)
    check_tree(tree, reference.params_shape_tree, values=False)
    check_tree(params, tree)
    check_tree(reference_class.from_pretrained(tmp_path / "twin", _do_init=False)[1], tree)

    x = random_images(NATIVE, dtype="float32")
    inputs = {}
    if "bool_masked_pos" in inspect.signature(reference_class.__call__).parameters:
        inputs = inputs_of(case, ours.config, NATIVE)
        inputs.pop("labels", None)  # accepted by none of them
    check_stages(
        ours(x, **inputs, **ALL), flax_outputs(reference, x, params, **inputs), "flax reference"
    )

    reference.save_pretrained(tmp_path / "msgpack", params=params)
    reference.save_pretrained(tmp_path / "safetensors", params=params, safe_serialization=True)
    assert (tmp_path / "msgpack" / "flax_model.msgpack").exists()
    assert "encoder.layer.0.attention.output.dense.kernel" in {
        key.removeprefix("beit.").removeprefix("dinov2.")
        for key in load_file(tmp_path / "safetensors" / "model.safetensors")
    }
    for folder in ("msgpack", "safetensors"):
        again, again_twin = load_twins(tmp_path / folder, case.name, "float32")
        check_tree(again.params, ours.params)
        check_state(again_twin, twin)


def check_tree(got, want, values: bool = True) -> None:
    got, want = flatten_dict(dict(got)), flatten_dict(dict(want))
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert got[path].shape == value.shape, path
        if values:
            np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), str(path))


def check_state(got: torch.nn.Module, want: torch.nn.Module) -> None:
    state, wanted = got.state_dict(), want.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("value", "size"), [(0.5, NATIVE), (1.0, WIDE)], ids=["layer scale", "positions"]
)
def test_defects_of_the_flax_reference_are_not_ours(value, size, tmp_path):
    """FlaxDinov2 of 4.57.6 multiplies the learned factors by `layerscale_value` twice (its last
    hidden state is 1.4 away from its PyTorch model's with 0.5) and resamples positions with
    another kernel, at an offset (0.5 away at 8 x 32 from 16 x 16). Ours agrees with PyTorch's."""
    case = one_block(Case("Dinov2Model", {"layerscale_value": value}))
    reference = make_reference(case, dtype=torch.float32)
    reference.save_pretrained(tmp_path)
    x = random_images(size, dtype="float32")
    with torch.no_grad():
        want = to_numpy(reference(torch.tensor(x)).last_hidden_state)
    ours, _ = load_twins(tmp_path, case.name, "float32")
    ours.save_pretrained(tmp_path / "flax", to="flax")
    theirs, params = transformers.FlaxDinov2Model.from_pretrained(tmp_path / "flax", _do_init=False)
    wrong = flax_outputs(theirs, x, params).last_hidden_state
    assert difference("theirs", wrong, want).max_abs > 0.3
    stage = difference("ours", ours(x).last_hidden_state, want)
    assert stage.max_abs <= BOUNDS["reference float32"], stage


def ours_to_theirs(config: ViTConfig):
    """Transformers' configuration with the same fields."""
    table = config.to_dict()
    return transformers.AutoConfig.for_model(table.pop("model_type"), **table)


# -- gradients

GRADIENTS = {
    "deit teacher": CASES["deit teacher"],
    "beit": CASES["beit, all positions"],
    "registers, gated": Case("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}),
    "dinov2 classifier": Case("Dinov2ForImageClassification", {"use_mask_token": False}),
}


def check_gradients(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Every parameter's gradient, relative to that parameter's largest entry."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        stage = difference(name, got[name], value)
        # The softmax does not see the key's bias: that gradient is rounding and nothing else.
        scale = 1.0 if "key.bias" in name else stage.scale
        assert scale > 1e-6, f"{name} has no gradient to compare"
        bound = BOUNDS["gradients float64"] * scale
        assert stage.max_abs <= bound, f"{stage} is over {bound}"


def scalar(output, array) -> Any:
    """A sum over all the outputs that have gradients, each entry with its own weight."""
    rng = np.random.default_rng(8)
    total = 0.0
    for name in ("last_hidden_state", "pooler_output", "logits", "cls_logits"):
        value = output.get(name)
        if value is not None:
            total = total + (value * array(rng.normal(size=tuple(value.shape)))).sum()
    return total


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_every_parameter(name, tmp_path, monkeypatch):
    """The twin against Transformers, whose names it also has up to their order, and Flax against
    the twin."""
    case = one_block(GRADIENTS[name])
    reference = make_reference(case)
    reference.save_pretrained(tmp_path)
    x = random_images(NATIVE, 2)
    with jax.enable_x64(True):
        ours, twin = load_twins(tmp_path, case.name)
        inputs = {}
        if case.name.endswith("Model"):
            inputs = {"bool_masked_pos": patch_mask(NATIVE, 2)}
        with references_in_float64(monkeypatch):
            scalar(reference(torch.tensor(x), **as_torch(inputs)), torch.tensor).backward()
        scalar(twin(torch.tensor(x), **as_torch(inputs)), torch.tensor).backward()
        want = {n: to_numpy(p.grad) for n, p in twin.named_parameters()}
        theirs = [to_numpy(p.grad) for p in reference.parameters()]
        check_gradients(paired(reference, theirs, twin), want)
        gradient = jax.grad(lambda p: scalar(ours(x, params=p, **inputs), jnp.asarray))(ours.params)
    flat = flatten_dict(gradient, sep="/")
    mapped = to_canonical({n: as_tensor(n, np.asarray(g)) for n, g in flat.items()}, TREE)
    prefix = f"{ours.base_model_prefix}."
    full = {n.removeprefix(prefix): n for n in want}
    check_gradients(
        {full[n.removeprefix(prefix)]: t.read() for n, t in mapped.tensors.items()}, want
    )


def paired(reference, values: list[np.ndarray], twin) -> dict[str, np.ndarray]:
    """The reference's gradients under the twin's names: the parameters hold the same values."""
    found = {}
    known = {to_numpy(p).tobytes(): n for n, p in twin.named_parameters()}
    for parameter, value in zip(reference.parameters(), values, strict=True):
        name = known.pop(to_numpy(parameter).tobytes())
        found[name] = value.reshape(dict(twin.named_parameters())[name].shape)
    assert not known
    return found


# -- stochastic depth

DEPTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("linear", SMALL),
    "DeiT": ("linear", SMALL),
    "Beit": ("linear", SMALL),
    "Dinov2": ("constant", DINO),
    "Dinov2WithRegisters": ("constant", DINO),
}
RATE = 0.4
IMAGES = 1500


def depth_model_config(family: str, **fields: Any) -> ViTConfig:
    sizes = {"image_size": 8, "hidden_size": 12, "drop_path_rate": RATE}
    return getattr(vit_torch, f"{family}Config")(**{**DEPTHS[family][1], **sizes, **fields})


@pytest.mark.parametrize("family", DEPTHS)
def test_rates_of_stochastic_depth(family):
    config = depth_model_config(family, num_hidden_layers=5)
    twin = getattr(vit_torch, f"{family}Model")(config)
    rates = [layer.drop_path.p for layer in twin.encoder.layer]
    if family in ("ViT", "DeiT"):  # Transformers has none: timm's rule, that of the papers
        want = [0.0, 0.1, 0.2, 0.3, 0.4]
    else:
        reference = getattr(transformers, f"{family}Model")(ours_to_theirs(config))
        want = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in reference.encoder.layer]
    np.testing.assert_allclose(rates, want, atol=1e-7)
    np.testing.assert_allclose(config.drop_path_rates, want, atol=1e-7)
    assert (want == [RATE] * 5) == (DEPTHS[family][0] == "constant")


@pytest.mark.parametrize(
    ("framework", "family"),
    [("torch", family) for family in DEPTHS]
    + [("flax", family) for family in ("ViT", "Beit", "Dinov2")],
)
def test_stochastic_depth(family, framework):
    """Of many equal images each goes through or around each branch of the last block, all tokens
    together; the branch taken is scaled by one over how often it is taken.

    That evaluation drops nothing, BEiT's tests above show: its rate is 0.1 by default.
    (FlaxDinov2 of 4.57.6 never drops anything: it does not tell its blocks that they train.)
    """
    config = depth_model_config(family)
    weights = random_weights(config)
    twin = torch_twin(getattr(vit_torch, f"{family}Model"), config, weights)
    one = random_images((8, 8), 1, "float32")
    many = np.repeat(one, IMAGES, axis=0)
    if framework == "torch":
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            trained = twin.train()(torch.tensor(many), output_hidden_states=True)
            twin.eval()
        states = [to_numpy(state) for state in trained.hidden_states]
    else:
        model = flax_twin(getattr(vit_flax, f"Flax{family}Model"), config, weights)
        key = jax.random.PRNGKey(3)
        with pytest.raises(InputError, match="needs `dropout_rng`"):
            model(one, train=True)
        trained = model(many, train=True, dropout_rng=key, output_hidden_states=True)
        states = [np.asarray(state) for state in trained.hidden_states]

    first = 1 if DEPTHS[family][0] == "linear" else 0
    if first:  # nothing is dropped in the first block
        assert np.ptp(states[1], axis=0).max() < 1e-5
    layer, keep = twin.encoder.layer[first], 1.0 - RATE
    before, after = torch.tensor(states[first]), states[first + 1]
    scale = (layer.lambda_1, layer.lambda_2) if config.has_layer_scale else (1.0, 1.0)
    ways = []
    for attention, mlp in itertools.product((0.0, 1.0 / keep), repeat=2):
        with torch.no_grad():
            branch = layer.attention(layer.layernorm_before(before), None, None, False, (2, 2))
            branch = branch[0] if isinstance(branch, tuple) else branch  # of BEiT
            middle = before + attention * scale[0] * branch
            branch = layer.output(layer.intermediate(layer.layernorm_after(middle)))
            end = to_numpy(middle + mlp * scale[1] * branch)
        ways.append(np.abs(end - after).max(axis=(1, 2)) < 1e-4)
    around_both, mlp_alone, attention_alone, through_both = ways
    np.testing.assert_array_equal(np.sum(ways, axis=0), 1)
    # Five standard deviations of a mean of draws; each branch draws its own.
    margin = 5 * np.sqrt(RATE * keep / IMAGES)
    assert abs((attention_alone | through_both).mean() - keep) < margin
    assert abs((mlp_alone | through_both).mean() - keep) < margin
    assert abs(through_both.mean() - keep * keep) < margin
    assert abs(around_both.mean() - RATE * RATE) < margin


# -- files


@NO_REGISTERS
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_our_files(name, tmp_path):
    """Both twins' directories: no key missing or in excess, the same weights, and the twins read
    each other's bits."""
    case = CASES[name]
    reference = make_reference(case, dtype=torch.float32)
    reference.save_pretrained(tmp_path / "reference")
    ours, twin = load_twins(tmp_path / "reference", case.name, "float32")
    ours.save_pretrained(tmp_path / "flax")
    twin.save_pretrained(tmp_path / "torch")
    for folder in ("flax", "torch"):
        read, report = getattr(transformers, case.name).from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        if name == "no registers":
            assert report.pop("missing_keys") == ["embeddings.register_tokens"]
        assert not any(report.values()), report
        check_state(read, reference)
        assert theirs_without_labels(read.config) == theirs_without_labels(reference.config)
    through_flax = getattr(vit_torch, case.name).from_pretrained(tmp_path / "flax")
    check_state(through_flax, twin)
    twin.save_pretrained(tmp_path / "tree", to="flax-safetensors")
    back = getattr(vit_flax, f"Flax{case.name}").from_pretrained(tmp_path / "tree")
    check_tree(back.params, ours.params)


def theirs_without_labels(config) -> dict[str, Any]:
    """The fields of a configuration of Transformers that say what the network is."""
    table = config.to_dict()
    for name in ("architectures", "_name_or_path", "dtype", "transformers_version"):
        table.pop(name, None)
    return table


# -- ViT's extensions

EXTENSIONS: dict[str, dict[str, Any]] = {
    "layer scale": {"layer_scale_init_value": 1e-5},
    "registers, all with positions": {"num_register_tokens": 2},
    "registers without positions": {"num_register_tokens": 3, "position_tokens": "cls"},
    "positions of the patches": {"num_register_tokens": 1, "position_tokens": "patches"},
    "no class token": {"use_cls_token": False, "pooling": "mean"},
    "registers alone": {
        "use_cls_token": False,
        "pooling": "mean",
        "num_register_tokens": 2,
        "position_tokens": "patches",
    },
    "mean pooled": {"pooling": "mean"},
    "norm after the mean": {"pooling": "mean", "norm_after_pooling": True},
    "pre-logits": {"use_representation_layer": True, "pooler_output_size": 20},
    "gated": {"use_swiglu_ffn": True},
    "layer scale of attention": {"layer_scale_init_value": 0.1, "use_mlp_layer_scale": False},
    "axial rotary": {"rope_type": "axial", "rope_grid_size": (3, 5), "rope_grid_offset": 1.0},
    "DINOv3's rotary": {
        "rope_type": "dinov3",
        "rope_theta": 100.0,
        "rope_rotate_half": True,
        "num_register_tokens": 2,
        "use_absolute_position_embeddings": False,
    },
    "mixed rotary": {"rope_type": "mixed", "rope_grid_indexing": "xy"},
    "attention pooling": {"use_cls_token": False, "pooling": "map", "hidden_act": "gelu_new"},
    "attention pooling of all tokens": {
        "pooling": "map",
        "pooler_num_heads": 2,
        "pooler_intermediate_size": 20,
        "pool_prefix_tokens": True,
    },
    "norm before the blocks": {"use_patch_bias": False, "use_pre_norm": True},
    "other norms": {
        "norm_type": "rmsnorm",
        "use_qk_norm": True,
        "use_attention_norm": True,
        "use_mlp_norm": True,
        "use_key_bias": False,
        "use_final_norm": False,
    },
    "branches": {"num_parallel_branches": 3, "use_qk_norm": True},
    "parallel": {"block_type": "parallel", "layer_scale_init_value": 0.1},
    "norms after": {"block_type": "post_norm"},
    "relative positions by an MLP": {
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": True,
        "relative_position_type": "mlp",
        "relative_position_width": 12,
    },
    "differential attention": {"attention_type": "differential"},
    "MBConv before the patches": {
        "patch_size": 8,
        "stem_type": "mbconv",
        "stem_depths": (1,),
        "stem_width": 32,
        "use_swiglu_ffn": True,
        "gate_act": "gelu",
        "use_mlp_input_norm": True,
    },
    "convolutions before the patches": {
        "image_size": (32, 16),
        "patch_size": 8,
        "stem_type": "convolutions",
        "stem_width": 32,
    },
    "a ResNet-D before the patches": {
        "stem_type": "resnetd",
        "stem_depths": (1,),
        "stem_width": 32,
    },
    "a ResNet before the patches": {
        "stem_type": "resnetv2",
        "stem_depths": (1,),
        "stem_width": 32,
    },
    "all at once": {
        "layer_scale_init_value": 0.1,
        "num_register_tokens": 2,
        "position_tokens": "cls",
        "use_swiglu_ffn": True,
        "use_relative_position_bias": False,
        "pooling": "mean",
        "norm_after_pooling": True,
    },
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extensions_of_vit_in_both_twins(name):
    """Classifiers at another size; timm is the reference elsewhere."""
    config = ViTConfig(**{**SMALL, **EXTENSIONS[name], "num_hidden_layers": 1})
    weights = random_weights(config, "classifier")
    with jax.enable_x64(True):
        report = compare(
            flax_twin(vit_flax.FlaxViTForImageClassification, config, weights, jnp.float64),
            torch_twin(vit_torch.ViTForImageClassification, config, weights, torch.float64),
            images(config, 3, size=WIDE),
            interpolate_pos_encoding=True,
            labels=np.array([1, 0, 4]),
        )
    assert report.stages[-1].name == "logits"
    assert report.first_over(BOUNDS["twins float64"]) is None, report.largest


@pytest.mark.parametrize("name", EXTENSIONS)
def test_files_of_extensions(name, tmp_path, caplog):
    config = ViTConfig(**{**SMALL, **EXTENSIONS[name]})
    twin = torch_twin(
        vit_torch.ViTForImageClassification, config, random_weights(config, "classifier")
    )
    twin.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.to_dict()["model_type"] == "vit_extended"
    assert read.is_extended
    check_fields(read, config)
    check_state(vit_torch.ViTForImageClassification.from_pretrained(tmp_path), twin)
    ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "flax", to="flax")
    check_state(vit_torch.ViTForImageClassification.from_pretrained(tmp_path / "flax"), twin)

    with pytest.raises(ValueError, match="vit_extended"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    logger = logging.getLogger("transformers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        transformers.logging.set_verbosity_warning()
        transformers.ViTConfig.from_pretrained(tmp_path)
    finally:
        transformers.logging.set_verbosity_error()
        logger.removeHandler(caplog.handler)
    assert "vit_extended" in caplog.text


def check_fields(got: ViTConfig, want: ViTConfig) -> None:
    for name in want.fields:
        if name not in ("architectures", "dtype"):
            assert getattr(got, name) == getattr(want, name), name


# -- configurations

# What only Transformers' segmentation heads and backbones read.
NOT_OURS: dict[str, set[str]] = {
    "Beit": {
        "out_indices",
        "add_fpn",
        "reshape_hidden_states",
        "use_auxiliary_head",
        "auxiliary_loss_weight",
        "auxiliary_channels",
        "auxiliary_num_convs",
        "auxiliary_concat_input",
        "semantic_loss_ignore_index",
        "pool_scales",
        "out_features",
    },
    "Dinov2": {"out_features", "out_indices", "apply_layernorm", "reshape_hidden_states"},
}
NOT_OURS["Dinov2WithRegisters"] = NOT_OURS["Dinov2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    reference_class = getattr(transformers, f"{family}Config")
    parameters = inspect.signature(reference_class.__init__).parameters
    names = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    config, reference = getattr(vit_torch, f"{family}Config")(), reference_class()
    for name in names:
        if name in NOT_OURS.get(family, ()):
            assert name not in config.fields
        else:
            assert name in config.fields, name
            assert getattr(config, name) == getattr(reference, name), name
    own = [name for name in config.fields if name in names]
    assert own == [n for n in names if n in own], "positional arguments in the same order"
    for name in ("num_labels", "id2label", "label2id", "model_type", "return_dict"):
        assert getattr(config, name) == getattr(reference, name)


@pytest.mark.parametrize("name", CASES)
def test_configurations_through_transformers(name):
    case = CASES[name]
    config_class = getattr(vit_torch, f"{family_of(case.name)}Config")
    reference = reference_config(case)
    config = config_class.from_dict(reference.to_dict())
    for field, value in case.fields.items():
        assert getattr(config, field) == value
    again = type(reference).from_dict(config.to_dict())
    assert theirs_without_labels(again) == theirs_without_labels(reference)
    assert config_class.from_dict(again.to_dict()) == config
    assert AutoConfig.from_dict(config.to_dict()) == config
    bare = config_class(**{**(DINO if "Dinov2" in case.name else SMALL), **case.fields})
    check_fields(config_class.from_dict(type(reference)(**bare.to_dict()).to_dict()), bare)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_familys_configuration_names_the_class_to_use(family):
    config = getattr(vit_torch, f"{family}Config")()
    wanted = f"use {family}Model or {family}ForImageClassification"
    with pytest.raises(ConfigError, match=wanted):
        ViTConfig.from_dict(config.to_dict())
    with pytest.raises(ConfigError, match=wanted):
        vit_torch.ViTModel(config)
    with pytest.raises(ConfigError, match=wanted):
        vit_flax.FlaxViTModel(config, _do_init=False)
    with pytest.raises(ConfigError, match="use ViTModel or ViTForImageClassification"):
        getattr(vit_torch, f"{family}Model")(ViTConfig())


@pytest.mark.parametrize("cls", [vit_torch.ViTModel, vit_flax.FlaxViTModel])
def test_another_familys_files_name_the_class_to_use(cls, tmp_path):
    case = CASES["deit teacher"]
    make_reference(case, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"given DeiTConfig.*use DeiTModel or DeiTFor"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("Dinov2", "intermediate_size", 64),
        ("Dinov2", "pooler_output_size", 12),
        ("Dinov2", "layer_scale_init_value", 0.5),
        ("Beit", "pooling", "mean"),
        ("Beit", "norm_after_pooling", True),
        ("ViT", "num_patches", 7),
    ],
)
def test_derived_fields_cannot_be_set(family, name, value):
    config = getattr(vit_torch, f"{family}Config")()
    with pytest.raises(ConfigError, match=f"`{name}` must be left alone: {family}Config derives"):
        setattr(config, name, value)


@pytest.mark.parametrize(
    ("family", "fields", "match"),
    [
        ("ViT", {"use_cls_token": False}, "`pooling` must be 'mean' or 'map' where `use_cls"),
        ("ViT", {"norm_after_pooling": True}, "`pooling` must be 'mean' where `norm_after_pool"),
        (
            "ViT",
            {"pooling": "mean", "norm_after_pooling": True, "use_representation_layer": True},
            "must not both be True",
        ),
        ("ViT", {"pooling": "max"}, "`pooling` must be one of 'cls', 'mean', 'cls_mean'"),
        ("ViT", {"position_tokens": "some"}, "`position_tokens` must be one of 'all', 'cls'"),
        ("ViT", {"num_register_tokens": -1}, "`num_register_tokens` must be an integer of at"),
        ("ViT", {"drop_path_rate": 1.0}, "`drop_path_rate` must be a number from 0 to below 1"),
        ("DeiT", {"use_cls_token": False}, "`use_cls_token` must be True for DeiTConfig"),
        ("DeiT", {"num_register_tokens": 2}, "`num_register_tokens` must be 0 for DeiTConfig"),
        ("Beit", {"qkv_bias": False}, "`qkv_bias` must be True for BeitConfig"),
        ("Beit", {"vocab_size": 0}, "`vocab_size` must be an integer of at least 1"),
        ("Dinov2", {"num_register_tokens": 4}, "`num_register_tokens` must be 0 for Dinov2Con"),
        ("Dinov2", {"mlp_ratio": 0}, "`mlp_ratio` must be a number above 0"),
        ("Dinov2", {"model_type": "beit"}, "use BeitModel or BeitForImageClassification"),
        ("Dinov2", {"model_type": "swin"}, "configuration of another architecture"),
    ],
)
def test_refused_configurations(family, fields, match):
    with pytest.raises(ConfigError, match=match):
        getattr(vit_torch, f"{family}Config")(**fields)


def test_config_classes_are_by_their_model_type():
    for model_type, cls in CONFIG_CLASSES.items():
        assert model_type in (cls.model_type, cls.extended_type)


def test_a_mask_needs_a_mask_token():
    config = vit_torch.BeitConfig(**SMALL)
    x, mask = random_images(NATIVE, 1, "float32"), patch_mask(NATIVE, 1)
    model = flax_twin(vit_flax.FlaxBeitModel, config, random_weights(config))
    with pytest.raises(InputError, match="needs a mask token"):
        vit_torch.BeitModel(config)(torch.tensor(x), bool_masked_pos=torch.tensor(mask))
    with pytest.raises(InputError, match="needs a mask token"):
        model(x, bool_masked_pos=mask)


def test_layers_that_are_missing_are_refused(tmp_path):
    case = CASES["dinov2"]
    make_reference(case, dtype=torch.float32).save_pretrained(tmp_path)
    for module, prefix in ((vit_flax, "Flax"), (vit_torch, "")):
        with pytest.raises(CheckpointError, match=r"encoder\.layer\.2"):
            getattr(module, f"{prefix}Dinov2Model").from_pretrained(tmp_path, num_hidden_layers=3)
