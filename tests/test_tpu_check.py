"""`vit_flax.tpu_check` and `vit verify --device tpu`: what the TPU compiler says is read rightly,
and each planted fault is reported. Tests that need the compiler (the package libtpu, no TPU) are
skipped without it; `make test-tpu` runs them."""

import importlib.util
import json
import os
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from kinds import config_of, kinds

from vit_cli.commands import tpu as command
from vit_common.config import BeitConfig, ViTConfig
from vit_common.errors import InputError, MissingFileError
from vit_common.flops import forward_flops
from vit_common.presets import preset
from vit_flax import tpu_check
from vit_flax.attention import attention, compiled_for
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
from vit_flax.inference.engine import Engine
from vit_flax.int8 import quantize
from vit_flax.sharding import batch_sharding, param_shardings, replicated
from vit_flax.tpu_check import (
    CHIPS,
    Check,
    Program,
    TPUReport,
    check,
    check_program,
    chip_mesh,
    exchange_check,
    libtpu_environment,
    network,
    training_mesh,
    training_step,
)

needs_compiler = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("libtpu", "optax")),
    reason="needs XLA's TPU compiler and optax: pip install '.[tpu-check]'",
)

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
SMALL = ViTConfig(**SIZES)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# -- the reading of the compiler's text, on programs compiled for the CPU


def product(a, b):
    return a @ b


def batched(a, b):
    return jnp.einsum("bik,bkj->bij", a, b)


def strided(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(2, 1),
        padding=((2, 2), (0, 2)),
        lhs_dilation=(1, 2),
        rhs_dilation=(2, 1),
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def patches(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (8, 8), "VALID", dimension_numbers=("NCHW", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (product, ((5, 7), (7, 3))),
        (batched, ((5, 6, 7), (5, 7, 9))),
        (strided, ((2, 12, 10, 6), (3, 2, 3, 8))),
        (patches, ((2, 3, 32, 24), (8, 8, 3, 16))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_product_flops_are_those_of_xla(function, shapes):
    compiled = jax.jit(function).lower(*(shape(*sizes) for sizes in shapes)).compile()
    assert product_flops(compiled.as_text()) == compiled.cost_analysis()["flops"]


def test_product_flops_count_every_round_of_a_loop():
    def loop(state, weights):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights), None), state, length=7)[0]

    compiled = jax.jit(loop).lower(shape(64, 64), shape(64, 64)).compile()
    assert product_flops(compiled.as_text()) == 7 * 2 * 64**3


def test_float32_products_are_named():
    def f(x, weights):
        with jax.named_scope("inner"):
            return jnp.exp(x) @ weights

    text = jax.jit(f).lower(shape(8, 64), shape(64, 64)).compile().as_text()
    (name,) = float32_products(text)
    assert name.endswith("inner/dot_general")
    assert float32_products(jax.jit(jnp.exp).lower(shape(8, 64)).compile().as_text()) == []


def test_biases_of_offsets_may_be_float32():
    config = config_of("relative MLP", num_hidden_layers=1)
    model = FlaxAutoModelForImageClassification.from_config(config, dtype=jnp.bfloat16)
    found = jax.jit(lambda p, x: model.module.apply({"params": p}, x).logits)
    text = found.lower(model.params, jnp.zeros((1, 16, 16, 3))).compile().as_text()
    assert [name for name in float32_products(text) if "relative_position_bias" in name] == []


def test_the_resampling_of_positions_may_be_float32():
    def resample(rows, columns, table):
        return jnp.einsum("Hh,Ww,hwd->HWd", rows, columns, table, precision="highest")

    lowered = jax.jit(resample).lower(shape(24, 14), shape(24, 14), shape(14, 14, 32))
    text = lowered.compile().as_text()
    assert product_flops(text) > 0
    assert float32_products(text) == []


# As the TPU compiler writes them, cut to what matters.
PRODUCTS = """HloModule jit_f

ENTRY %main.1 (x.1: bf16[128,256], w.1: f32[256,256]) -> f32[128,256] {
  %x.1 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = f32[256,256]{1,0:T(8,128)} parameter(1)
  %w.2 = bf16[256,256]{1,0:T(8,128)(2,1)} convert(%w.1)
  %small = f32[128,256]{1,0:T(8,128)} convolution(%x.1, %w.2), dim_labels=bf_io->bf, metadata={op_name="jit(f)/small"}
  ROOT %wide = f32[128,256]{1,0:T(8,128)} convolution(%small, %w.1), dim_labels=bf_io->bf, metadata={op_name="jit(f)/wide"}
}
"""  # noqa: E501
BATCHED = """HloModule jit_f

ENTRY %main.1 (q.1: bf16[64,197,12,64], k.1: bf16[64,197,12,64]) -> bf16[64,12,197,197] {
  %q.1 = bf16[64,197,12,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[64,197,12,64]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[64,12,197,197]{2,3,1,0:T(8,128)(2,1)} convolution(%q.1, %k.1), window={size=64x12 stride=63x11 lhs_dilate=64x12}, dim_labels=0b1f_0o1i->01bf
}
"""  # noqa: E501


def test_operands_decide_not_the_result():
    assert float32_products(PRODUCTS) == ["jit(f)/wide"]
    assert product_flops(PRODUCTS) == 2 * (2 * 128 * 256 * 256)


def test_batched_products_as_the_tpu_compiler_writes_them():
    assert product_flops(BATCHED) == 2 * (64 * 12) * 197 * 197 * 64


def test_collectives_are_counted_by_kind():
    text = """
  %all-reduce.1 = f32[256]{0} all-reduce(%a), channel_id=1, to_apply=%sum
  %all-reduce.2 = f32[256]{0} all-reduce(%b), channel_id=2, to_apply=%sum
  %s = (f32[64]{0}, f32[256]{0}) all-gather-start(%c), channel_id=3, dimensions={0}
  %d = f32[256]{0} all-gather-done(%s)
  %fusion = f32[256]{0} fusion(%all-reduce.1), kind=kLoop, calls=%fused
"""
    assert collectives(text) == {"all-reduce": 2, "all-gather": 1}
    assert collectives(PRODUCTS) == {}


# A gather in the three parts that the compiler divides it into, and gradients that are scattered as
# they are summed, in a ring: a counter from 0 to 8 by twos.
RING = """HloModule jit_step

%fused_start (p.1: bf16[48,768]) -> bf16[768,768] {
  %p.1 = bf16[48,768]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[768,768]{1,0} all-gather(%p.1), channel_id=9, dimensions={0}, metadata={op_name="jit(step)/query/dot_general"}
}

%fused_done (p.2: bf16[48,768]) -> bf16[768,768] {
  %p.2 = bf16[48,768]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[768,768]{1,0} all-gather(%p.2), channel_id=9, dimensions={0}, metadata={op_name="jit(step)/query/dot_general"}
}

%wide.windowed_dot_general_cond_rs (p.3: (bf16[96,64], u32[])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8), metadata={op_name="jit(step)/key/dot_general"}
  %p.3 = (bf16[96,64]{1,0}, u32[]) parameter(0)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%p.3), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%wide.windowed_dot_general_body_rs.sunk (p.4: (bf16[96,64], u32[])) -> (bf16[96,64], u32[]) {
  %constant.2 = u32[]{:T(128)} constant(2)
  %p.4 = (bf16[96,64]{1,0}, u32[]) parameter(0)
  %get-tuple-element.2 = bf16[96,64]{1,0} get-tuple-element(%p.4), index=0
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%p.4), index=1
  %collective-permute.1 = bf16[96,64]{1,0} collective-permute(%get-tuple-element.2), channel_id=5, source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/key/dot_general"}
  %product.1 = bf16[96,64]{1,0} convolution(%collective-permute.1, %w.1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/key/dot_general"}
  %add.1 = u32[]{:T(128)} add(%get-tuple-element.3, %constant.2)
  ROOT %tuple.1 = (bf16[96,64]{1,0}, u32[]) tuple(%product.1, %add.1)
}

ENTRY %main.1 (x.1: bf16[96,64], w.1: bf16[64,64]) -> bf16[96,64] {
  %x.1 = bf16[96,64]{1,0} parameter(0)
  %w.1 = bf16[64,64]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %tuple.2 = (bf16[96,64]{1,0}, u32[]) tuple(%x.1, %zero)
  %while.1 = (bf16[96,64]{1,0}, u32[]) while(%tuple.2), condition=%wide.windowed_dot_general_cond_rs, body=%wide.windowed_dot_general_body_rs.sunk, metadata={op_name="jit(step)/key/dot_general"}
  %get-tuple-element.9 = bf16[96,64]{1,0} get-tuple-element(%while.1), index=0
  %collective-permute.2 = bf16[96,64]{1,0} collective-permute(%get-tuple-element.9), channel_id=6, source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/key/dot_general"}
  ROOT %all-reduce.1 = bf16[96,64]{1,0} all-reduce(%collective-permute.2), channel_id=7, to_apply=%sum, metadata={op_name="jit(step)/reduce_sum"}
}
"""  # noqa: E501


def test_rings_are_counted_once_and_their_products_each_round():
    assert product_flops(RING) == 4 * 2 * 96 * 64 * 64
    found = exchanges(RING)
    assert sorted(each.kind for each in found) == [
        "all-gather",
        "all-reduce",
        "reduce-scatter ring",
    ]
    assert max(each.elements for each in found) == 768 * 768
    # A sum of which each device keeps a part.
    scattered = RING.replace("%fused_done", "%all-reduce-scatter.6").replace(
        "ROOT %all-gather.2 = bf16[768,768]{1,0} all-gather(%p.2), channel_id=9, dimensions={0}",
        "%all-reduce.2 = bf16[48,768]{1,0} all-reduce(%p.2), channel_id=1, to_apply=%sum",
    )
    kinds = [each.kind for each in exchanges(scattered)]
    assert kinds.count("reduce-scatter") == 1
    assert kinds.count("all-reduce") == 1
    stray = RING.replace('jit(step)/key/dot_general"}\n  ROOT', 'jit(step)/other"}\n  ROOT')
    assert "collective-permute" in {each.kind for each in exchanges(stray)}


# As libtpu 0.0.42 compiles a training step of ViT-L on 4 x 4 chips: 1,024 rows over 4 are sent as
# 4 x 264, and 24 rows of each part belong to the next chip.
COMPLETED = """HloModule m

%all-reduce-scatter.4.clone.1 (input.14: bf16[1024,4096]) -> bf16[264,4096] {
  %input.14 = bf16[1024,4096]{1,0} parameter(0)
  %constant.1 = bf16[] constant(0)
  %pad.26 = bf16[1056,4096]{1,0} pad(%input.14, %constant.1), padding=0_32x0_0
  %all-reduce.69 = bf16[1056,4096]{1,0} all-reduce(%pad.26), channel_id=40, to_apply=%add
  %subtract.9 = u32[] constant(0)
  ROOT %dynamic-slice.9 = bf16[264,4096]{1,0} dynamic-slice(%all-reduce.69, %subtract.9)
}

ENTRY %main (p.1: bf16[1024,4096]) -> bf16[288,4096] {
  %p.1 = bf16[1024,4096]{1,0} parameter(0)
  %fusion.565 = bf16[264,4096]{1,0} fusion(%p.1), kind=kCustom, calls=%all-reduce-scatter.4.clone.1
  %slice.24 = bf16[24,4096]{1,0} slice(%fusion.565), slice={[240:264], [0:4096]}
  %collective-permute-start = (bf16[24,4096]{1,0}, bf16[24,4096]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice.24), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3}}
  %collective-permute-done = bf16[24,4096]{1,0} collective-permute-done(%collective-permute-start)
  ROOT %concatenate.6 = bf16[288,4096]{1,0} concatenate(%collective-permute-done, %fusion.565), dimensions={0}
}
"""  # noqa: E501


def test_the_end_of_a_reduce_scatter_is_no_exchange_of_its_own():
    assert [each.kind for each in exchanges(COMPLETED)] == ["reduce-scatter"]
    # What is taken from anything else is one.
    other = COMPLETED.replace("slice(%fusion.565)", "slice(%p.1)")
    assert sorted(each.kind for each in exchanges(other)) == [
        "collective-permute",
        "reduce-scatter",
    ]


def test_communication_is_held_to_the_mesh():
    class Both:
        shape: ClassVar = {"data": 2, "fsdp": 2, "model": 1}

    class Data:
        shape: ClassVar = {"data": 4}

    wide = ViTConfig(**{**SIZES, "hidden_size": 768, "intermediate_size": 768})
    good = exchange_check(RING, wide, Both)
    assert good.passed
    assert good.detail == "1 all-gather, 1 all-reduce, 1 reduce-scatter ring"
    # Gathers where nothing is split; an array larger than any parameter; something else.
    assert not exchange_check(RING, wide, Data).passed
    assert not exchange_check(RING, SMALL, Both).passed
    assert not exchange_check(RING.replace("all-reduce(", "all-to-all("), wide, Both).passed
    assert not exchange_check(PRODUCTS, wide, Both).passed  # nothing is gathered at all
    assert exchange_check(PRODUCTS, wide, Data).passed


def test_float64_is_found_as_written_and_as_compiled():
    with jax.enable_x64(True):
        lowered = jax.jit(lambda x: (x.astype(jnp.float64) * 3.0).astype(x.dtype)).lower(shape(8))
    assert "stablehlo.convert" in float64_operations(lowered.as_text(), "")
    assert "multiply" in float64_operations("", lowered.compile().as_text())
    single = jax.jit(lambda x: x * 3.0).lower(shape(8))
    assert float64_operations(single.as_text(), single.compile().as_text()) == []


def test_the_packages_kernels_say_what_they_do():
    call = (
        '  %k = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/attention/NAME/pallas_call"}, '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"500"}}}\n'
    )
    assert own_kernels(call.replace("NAME", "vit_attention")) == [500.0]
    # Of five products in this one the first was had before.
    assert own_kernels(2 * call.replace("NAME", "vit_attention_gradients")) == [400.0, 400.0]
    assert own_kernels(call.replace("NAME", "another")) == []


def test_custom_kernels_are_counted():
    text = '  %k = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
    assert custom_kernels(2 * text) == 2
    assert custom_kernels(PRODUCTS) == 0


# -- arguments


def test_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TPU_LOG_DIR", "mine")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    before = dict(os.environ)
    with libtpu_environment():
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
        assert os.environ["TPU_LOG_DIR"] == "mine"
    assert dict(os.environ) == before


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = r'libtpu and optax; run: pip install "libtpu==0\.0\.42\.\*" optax'
    with pytest.raises(InputError, match=wanted):
        check(SMALL)
    with pytest.raises(InputError, match=r"needs libtpu; run: pip install"):
        check(SMALL, training=False)
    with pytest.raises(InputError, match=wanted):
        command.compile_for_tpu("base", batch=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chips": ("v5e", "v99")}, r"`chips` must be some of v5e, v5p, v6e; given \('v5e', 'v99'"),
        ({"chips": ()}, r"`chips` must be some of v5e, v5p, v6e; given \(\)"),
        ({"batch": 0}, r"`batch` must be at least 1; given 0"),
        (
            {"dtype": "float64"},
            r"`dtype` must be one of bfloat16, float16, float32; given 'float64'",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        check(SMALL, **options)


def test_network_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, teacher = network("base")
    assert (config.hidden_size, config.num_labels, teacher) == (768, 1000, False)
    SMALL.save_pretrained(tmp_path / "base")  # what is there comes before a preset's name
    assert network("base")[0].hidden_size == 64
    with pytest.raises(MissingFileError, match="no-such-folder"):
        network(str(tmp_path / "no-such-folder"))


# -- the command, with the compiler's answer given


def report(**changes):
    program = {
        "chip": "v5e",
        "name": "forward",
        "batch": 2,
        "devices": 4,
        "seconds": 3.0,
        "analytic_flops": 1e9,
        "product_flops": 1e9,
        "flops": 1.1e9,
        "bytes_accessed": 2e9,
        "argument_bytes": 30_000_000,
        "output_bytes": 20_000_000,
        "aliased_bytes": 10_000_000,
        "temporary_bytes": 100_000_000,
        "code_bytes": 0,
        "collectives": {},
        "checks": (Check("compiles", True, "in 3 s"),),
    }
    return TPUReport("m", "bfloat16", {"jax": "0"}, (Program(**{**program, **changes}),))


def test_report_survives_json():
    found = report()
    assert TPUReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.programs[0].memory_bytes == 140_000_000


def answer(monkeypatch, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "_run", lambda request: found.to_dict())


def test_command_prints_a_table(monkeypatch, capsys):
    answer(monkeypatch, report())
    assert command.compile_for_tpu("base", batch=2) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = "v5e forward 1.0000 1.1000 2.00 GB 100.0 MB 140.0 MB 0.9% 3 s pass"
    assert " ".join(lines[2].split()) == wanted
    assert lines[-1] == "every assertion holds"


def test_command_names_what_failed(monkeypatch, capsys):
    failed = Check("no collective", False, "2 all-reduce")
    answer(monkeypatch, report(checks=(Check("compiles", True, "in 3 s"), failed)))
    assert command.compile_for_tpu("base", batch=2) == 1
    out = capsys.readouterr().out
    assert "v5e, forward: no collective: FAILED: 2 all-reduce" in out
    assert out.splitlines()[-1] == "some assertions FAILED"


def test_command_shows_what_did_not_compile(monkeypatch, capsys):
    failed = Check("fits", False, "used 20G of 15.75G hbm")
    answer(monkeypatch, report(flops=0.0, product_flops=None, checks=(failed,)))
    assert command.compile_for_tpu("base", batch=2) == 1
    assert "v5e, forward: fits: FAILED: used 20G of 15.75G hbm" in capsys.readouterr().out


def test_command_as_json(monkeypatch, capsys):
    answer(monkeypatch, report())
    assert command.compile_for_tpu("base", batch=2, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["programs"][0]["chip"] == "v5e"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.stderr.write('a\\nlast\\n'); sys.exit(3)", "code 3 .* last words: last"),
        ('print(\'{"error": "no such chip"}\')', "no such chip"),
    ],
)
def test_compiler_process_that_fails(monkeypatch, code, message):
    monkeypatch.setattr(command, "_CHILD", code)
    with pytest.raises(InputError, match=message):
        command._run({})


# -- the compiler itself


@pytest.fixture(scope="module")
def mesh():
    with libtpu_environment():
        yield chip_mesh("v5e")


def planted(mesh, function, *shapes, analytic_flops=0.0, dtype="bfloat16"):
    """The checks of a function whose last argument is split over the devices."""
    spec = jax.sharding.PartitionSpec
    shardings = [jax.sharding.NamedSharding(mesh, spec()) for _ in shapes]
    shardings[-1] = jax.sharding.NamedSharding(mesh, spec("data"))
    jitted = jax.jit(function, in_shardings=tuple(shardings))
    program = check_program(
        jitted, shapes, analytic_flops, 4, False, chip="v5e", name="planted", batch=1, dtype=dtype
    )
    return {each.name: each for each in program.checks}


WEIGHTS, BATCH = shape(256, 256, dtype=jnp.bfloat16), shape(512, 256, dtype=jnp.bfloat16)


def failures(checks):
    return [name for name, each in checks.items() if not each.passed]


@needs_compiler
def test_small_network_on_v5e():
    found = check(SMALL, chips=("v5e",), batch=2)
    assert [program.name for program in found.programs] == ["forward", "training step"]
    assert found.passed, [program.checks for program in found.programs]
    forward, step = found.programs
    assert forward.product_flops == 2 * forward_flops(SMALL)
    assert forward.collectives == {}
    assert 2.5 < step.product_flops / forward.product_flops < 3
    assert step.collectives  # the sum of the gradients: what the forward pass may not have
    assert step.aliased_bytes > 0  # the old state gives its memory to the new


@needs_compiler
@pytest.mark.slow
@kinds()
def test_every_kind_of_network_on_v5e(kind):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    found = check(config_of(kind, **sizes, num_hidden_layers=1), chips=("v5e",), batch=2)
    assert found.passed, [program.checks for program in found.programs]


@needs_compiler
def test_small_training_step_over_data_and_fsdp():
    found, texts = {}, {}
    with libtpu_environment():
        for axes in ((4, 1), (2, 2)):
            mesh = training_mesh("v5e:2x2", *axes)

            def more(text, axes=axes, mesh=mesh):
                texts[axes] = text
                return exchange_check(text, SMALL, mesh)

            built = training_step(SMALL, mesh, batch=2, dtype="bfloat16")
            found[axes] = check_program(
                *built, chip="v5e", name="step", batch=2, dtype="bfloat16", more=more
            )
        with pytest.raises(InputError, match="has 4 chips; given axes of 2 x 3"):
            training_mesh("v5e:2x2", 2, 3)
    whole, half = found[4, 1], found[2, 2]
    assert whole.passed, whole.checks
    # (The activations of so small a network are moved instead of its parameters, here and there.)
    assert [each.name for each in half.checks if not each.passed] in ([], ["collectives"])
    assert {"all-gather", "all-reduce"} <= {each.kind for each in exchanges(texts[2, 2])}
    # Half of the parameters and moments lies on each chip, but for vectors and tokens.
    assert half.argument_bytes < 0.75 * whole.argument_bytes


@needs_compiler
def test_nothing_planted(mesh):
    flops = 2 * 128 * 256 * 256
    checks = planted(mesh, lambda w, x: x @ w, WEIGHTS, BATCH, analytic_flops=flops)
    assert failures(checks) == []


@needs_compiler
def test_planted_float32_product(mesh):
    def f(w, x):  # without the exponential the compiler would multiply the bfloat16 numbers
        return (jnp.exp(x.astype(jnp.float32)) @ w.astype(jnp.float32)).astype(x.dtype)

    checks = planted(mesh, f, WEIGHTS, BATCH)
    assert failures(checks) == ["no float32 product"]
    assert "dot_general" in checks["no float32 product"].detail
    assert failures(planted(mesh, f, WEIGHTS, BATCH, dtype="float32")) == []


@needs_compiler
def test_planted_collective(mesh):
    checks = planted(mesh, lambda w, x: (x - x.mean(axis=0)) @ w, WEIGHTS, BATCH)
    assert failures(checks) == ["no collective"]
    assert checks["no collective"].detail == "1 all-reduce"


@needs_compiler
def test_planted_float64(mesh):
    def f(w, x):
        return (x.astype(jnp.float64) + 1e-9).astype(x.dtype) @ w

    with jax.enable_x64(True):
        checks = planted(mesh, f, WEIGHTS, BATCH)
    assert failures(checks) == ["no float64"]
    assert "stablehlo.convert" in checks["no float64"].detail


@needs_compiler
def test_planted_second_product(mesh):
    flops = 2 * 128 * 256 * 256
    checks = planted(mesh, lambda w, x: (x @ w) @ w, WEIGHTS, BATCH, analytic_flops=flops)
    assert failures(checks) == ["flops"]
    assert "matrix products 2.0000 of the analytic count" in checks["flops"].detail


@needs_compiler
def test_planted_program_that_does_not_fit(mesh):
    large = shape(4 * 2**17, 2**17, dtype=jnp.bfloat16)  # 34 GB a chip
    checks = planted(mesh, lambda x: jnp.exp(x), large)
    assert failures(checks) == ["fits"]


KERNELS = [
    # B on each chip, S, A, D/A, dtype, bias
    (2, 197, 3, 64, "bfloat16", False),
    (2, 197, 3, 64, "float32", True),
    (2, 257, 2, 80, "bfloat16", False),
    (1, 577, 12, 64, "bfloat16", False),
    (1, 1025, 2, 64, "bfloat16", False),
    (1, 4097, 4, 32, "float32", False),
]


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("gradient", [False, True], ids=["context", "gradients"])
def test_attention_kernels_compile(mesh, kernel, gradient):
    B, S, A, width, dtype, biased = kernel

    def run(bias, qkv):
        def context(*operands):
            return attention(*operands[:3], bias=(*operands[3:], None)[0], precision="highest")[0]

        operands = (*qkv, bias) if biased else qkv
        if not gradient:
            return context(*operands)
        found, pullback = jax.vjp(context, *operands)
        return pullback(found)

    rows = [shape(4 * B, S, A, width, dtype=dtype)] * 3
    flops = (2 + 4 * gradient) * 2 * B * A * S * S * width
    checks = planted(mesh, run, shape(1, A, S, S), rows, analytic_flops=flops, dtype=dtype)
    # The gradient of a bias is a sum over all images.
    assert failures(checks) == (["no collective"] if biased and gradient else [])
    assert "matrix products 1.0000" in checks["flops"].detail


def on_two_axes(config, *, batch, kernel):
    """The classifier with all tokens of its last block, as the inference engine compiles it, in
    bfloat16, for four chips: two rows of images, each with two chips that share a network."""
    cls = FlaxAutoModelForImageClassification.class_for(config)
    model = cls(config, dtype=jnp.bfloat16, _do_init=False, attn_implementation=kernel)
    chips = Mesh(chip_mesh("v5e").devices.reshape(2, 2), ("data", "model"))
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param_shardings(chips, path))
        for path, leaf in flatten_dict(model.params_shape_tree).items()
    }
    pixels = (config.num_channels, *config.image_height_width)
    engine = Engine(unflatten_dict(params), config, pixels, mesh=chips)
    engine.add("logits", lambda params, x: (model(x, params=params, return_dict=True).logits,))
    return engine.compile("logits", batch)


def squares(text, tokens):
    """Operations whose result has a number for each pair of tokens."""
    return re.findall(rf"= \w+\[[\d,]*\b{tokens},{tokens}[\],]", text)


@needs_compiler
@pytest.mark.parametrize("biased", [False, True])
def test_each_chip_computes_its_own_heads(biased):
    config = BeitConfig(**SIZES, use_relative_position_bias=True) if biased else SMALL
    with libtpu_environment():
        text = on_two_axes(config, batch=4, kernel="auto").as_text()
    assert len(own_kernels(text)) == custom_kernels(text) == SMALL.num_hidden_layers
    assert collectives(text) == {"all-reduce": 2 * SMALL.num_hidden_layers}


@needs_compiler
@pytest.mark.slow
def test_heads_on_two_chips_against_eager():
    """Two blocks of large, 512 images. The kernel never writes the scores to memory."""
    config = preset("large", num_labels=1000, num_hidden_layers=2)
    with libtpu_environment():
        kernel = on_two_axes(config, batch=512, kernel="pallas")
        eager = on_two_axes(config, batch=512, kernel="eager")
    ours, theirs = kernel.as_text(), eager.as_text()
    assert collectives(ours) == collectives(theirs) == {"all-reduce": 2 * 2}
    assert (len(own_kernels(ours)), len(own_kernels(theirs))) == (2, 0)
    assert squares(theirs, 197)
    assert not squares(ours, 197)
    assert product_flops(ours) == product_flops(theirs)
    # Seen: 7.75 of 10.53 GB, and 319 of 663 MB.
    accessed = [each.cost_analysis()["bytes accessed"] for each in (kernel, eager)]
    assert accessed[0] <= 0.8 * accessed[1]
    temporary = [each.memory_analysis().temp_size_in_bytes for each in (kernel, eager)]
    assert temporary[0] <= 0.55 * temporary[1]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_base_needs_half_of_what_transformers_does(chip):
    """Transformers' FlaxViT with bfloat16 parameters, 1024 images on v5e: 221 GB accessed and
    5077 MB of temporary memory (docs/tpu.md)."""
    config = preset("base", num_labels=1000)
    built = tpu_check.forward(config, chip_mesh(chip, devices=1), batch=1024, dtype="bfloat16")
    found = check_program(*built, chip=chip, name="forward", batch=1024, dtype="bfloat16")
    assert found.passed, found.checks
    assert found.bytes_accessed <= 221e9 / 2
    assert found.temporary_bytes <= 5077e6 / 2
    assert abs(found.flops_ratio - 1) <= 0.02


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", ["base", "large"])
def test_presets(name, chip):
    found = check(preset(name, num_labels=1000), chips=(chip,), batch=32)
    assert found.passed, [program.checks for program in found.programs]
    for program in found.programs:
        # Norms, softmax and activations are what is above the matrix products.
        assert 1.0 <= program.flops_ratio <= 1.03
        assert program.memory_bytes < CHIPS[chip].hbm_gb * 1e9


@needs_compiler
def test_command_compiles_in_its_own_process(tmp_path, capfd):
    SMALL.save_pretrained(tmp_path)
    model = str(tmp_path)
    assert command.compile_for_tpu(model, batch=1, chips=("v5e",), training=False) == 0
    out, err = capfd.readouterr()
    assert "every assertion holds" in out
    assert err == "vit: compiling for v5e: forward, 1 images on each chip, bfloat16\n"
    assert tpu_check.versions()["libtpu"] in out


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_integers_are_multiplied_as_integers(chip):
    """With activations in 8 bits, every product of a block has two operands of s8, and its sums
    are s32."""
    model = FlaxAutoModelForImageClassification.class_for(SMALL)(
        SMALL, dtype="bfloat16", _do_init=False
    )
    params = jax.eval_shape(
        lambda params: quantize(params, activations="int8"), model.params_shape_tree
    )
    with libtpu_environment():
        mesh = chip_mesh(chip)
        run = jax.jit(
            lambda params, x: model(x, params=params).logits,
            in_shardings=(replicated(mesh), batch_sharding(mesh)),
        )
        with compiled_for("tpu"):
            lowered = run.lower(params, shape(8 * mesh.size, 3, 32, 32, dtype=jnp.bfloat16))
        text = lowered.compile().as_text()
    dtypes = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    products = re.findall(r"= (\w+)\[\S* (?:convolution|dot)\(([^)]*)\)", text)
    found = [
        (result, *(dtypes[name] for name in re.findall(r"%([\w.\-]+)", operands)))
        for result, operands in products
    ]
    # Query, key, value, attention's output, and the MLP; of one block.
    assert found.count(("s32", "s8", "s8")) == 6
    assert not [each for each in found if "s8" in each and each != ("s32", "s8", "s8")]
