"""Does the suite notice? Plants faults in the source of the twins, one at a time, in a copy, and
runs the test that should see each: `make mutants`, or `python tests/mutants.py [TEXT ...]` for
those whose names contain one of the texts.

Exit code: 0 every fault was seen, 1 at least one was not, 2 the tests could not be run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("vit_common", "convert", "vit_flax", "vit_torch", "vit_cli", "tests", "pyproject.toml")
FLAX, TORCH = "vit_flax/model.py", "vit_torch/model.py"
LAYERS = "vit_flax/layers.py"
FLAX_PART, TORCH_PART = "vit_flax/parts/part.py", "vit_torch/parts/part.py"
FLAX_ATTENTION, TORCH_ATTENTION = "vit_flax/attention/__init__.py", "vit_torch/attention.py"
FLAX_EAGER, FLAX_CHOICE = "vit_flax/attention/eager.py", "vit_flax/attention/choice.py"
FLAX_PRIMITIVE = "vit_flax/attention/primitive.py"
TPU_ATTENTION, STACKING = "vit_flax/attention/tpu.py", "vit_flax/stacked.py"

# -- the tests, each of which takes seconds

_SIGLIP = "tests/test_siglip.py::test_"
_PARITY, _FAMILIES = "tests/test_parity.py::test_", "tests/test_families.py::test_"
_NEAREST = "tests/test_timm_nearest.py::test_"
_VITAMIN = "tests/test_stems.py::test_vitamin_in_both_twins"
_TRAINING = "tests/test_training_parity.py::test_outputs_and_gradients_under_the_same_masks"
STAGES = f"{_PARITY}heads_of_the_twins_agree[float64-plain-classifier]"
DECODER = f"{_PARITY}heads_of_the_twins_agree[float64-wide image-decoder]"
LOSS = f"{_PARITY}losses_and_their_gradients_against_the_torch_reference[classes, some left out]"
SIZES = f"{_PARITY}twins_agree_at_other_sizes[float64-bicubic]"
HEAD_MASK = f"{_PARITY}twins_agree_under_a_head_mask[float64-layers and heads]"
POOLER = f"{_TRAINING}[vit]"
STRUCTURE = "tests/test_structure.py::test_both_twins_and_the_numpy_network_are_timms"
_STAGE = f"{_FAMILIES}every_stage_against_the_torch_reference"
DEIT = f"{_STAGE}[deitteacher-(16,16)]"
BEIT = f"{_STAGE}[beit,allpositions-(16,16)]"
DINOV2 = f"{_STAGE}[dinov2classifier-(16,16)]"
REGISTERS = f"{_STAGE}[tworegisters-(16,16)]"
KERNEL = f"{_FAMILIES}the_twins_kernel_against_the_references[beit, biases of a block]"
TRAINING = f"{_TRAINING}[vit with everything]"
TRAINING_DEIT = f"{_TRAINING}[deit teacher]"
TOKENS = f"{_TRAINING}[beit tokens]"
OFFSET = "tests/test_suite.py::test_norms_far_from_zero"
_ATTENTION = "tests/test_attention.py::test_"
WHOLE = f"{_ATTENTION}kernel_of_whole_images_against_torch[(3,17,3,64)-True]"
DEVICES = f"{_ATTENTION}every_device_computes_its_own_images"
SHARDED = "tests/test_sharding.py::test_numbers_and_collectives[BEiT-mesh3-pallas]"
TILED = f"{_ATTENTION}tiled_kernel_against_torch[(2,257,2,64)-128]"
_SCAN = "tests/test_scan.py::test_"
_ZERO_SHOT = "tests/test_zero_shot.py::test_"
_ADAPTERS = "tests/test_adapters.py::test_"
SCANNED = f"{_SCAN}every_stage_against_the_torch_reference[vit]"
SCANNED_TRAINING = f"{_SCAN}training_is_that_of_the_blocks_one_by_one[vit-"
SCANNED_TRAINING += "dots_with_no_batch_dims_saveable]"
SCANNED_DRAWS = f"{_SCAN}every_block_draws_its_own_masks"
STACK = f"{_SCAN}stack_and_unstack_are_inverses[None-float32]"
FRONT = "tests/test_front_tokens.py::test_logits_are_those_of_the_torch_reference"
_DATA, _LOADER = "tests/test_datasets.py::test_", "tests/test_loader.py::test_"
_AUGMENT = "tests/test_augment.py::test_"
FOLDERS, TABLES = "vit_common/datasets/folder.py", "vit_common/datasets/values.py"
ORDER, LOADER = "vit_common/datasets/order.py", "vit_flax/training/loader.py"
CROP, OPERATIONS = "vit_common/augment/geometry.py", "vit_common/augment/operations.py"
_TASKS = "tests/test_training_tasks.py::test_"
MASKED, DISTILL = (f"vit_flax/training/tasks/{name}.py" for name in ("masked", "distill"))
HALF, _HALF = "vit_flax/cpu/half.py", "tests/test_half_products.py::test_"
SOFTMAX = "tests/test_suite.py::test_softmax_in_half_precision"
STEP, LOSSES = "vit_flax/training/step.py", "vit_flax/training/losses.py"
MIXING, OPTIMIZERS = "vit_flax/training/mixing.py", "vit_flax/training/optimizers.py"
_STEP, _RULES = "tests/test_training_step.py::test_", "tests/test_optimizers.py::test_"
METRICS, EVALUATE = "vit_common/metrics/measures.py", "vit_flax/training/evaluate.py"
PROBE, CHARTS = "vit_flax/training/probe.py", "vit_cli/reports/charts.py"
_METRICS, _EVALUATE = "tests/test_metrics.py::test_", "tests/test_evaluate.py::test_"
TWIN_TRAINER, DEFINITIONS = "vit_torch/training.py", "vit_torch/verify/definitions.py"
_RUNS = "tests/test_training_runs.py::test_"
RUN = f"{_RUNS}a_run_is_the_same_in_both_frameworks[one block]"
CAUSE = f"{_RUNS}a_definition_that_differs_is_named[one step ahead]"
_MIXED, _LOSS = "tests/test_mixing.py::test_", "tests/test_losses.py::test_"


class Mutant(NamedTuple):
    """A fault: in that file, `old` (there once) becomes `new`; `test` is to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


_ROTARY = "tests/test_rotary.py::test_"
ROTARY, POSITIONS = "vit_flax/parts/rotary.py", "vit_common/positions.py"
TURNED = f"{_ROTARY}both_twins_rotate_as_timm_does"


_STEMS = "tests/test_stems.py::test_hybrids_of_"
_CLIP = "tests/test_clip.py::test_"
_INT8 = "tests/test_int8.py::test_"
_NNX = "tests/test_nnx.py::test_"
_RAY = "tests/test_ray.py::test_"
_SEARCH, _SERVE = "tests/test_search.py::test_", "tests/test_serve.py::test_"
_HABITS = "tests/test_habits.py::test_"
SEARCH, SERVICE = "vit_flax/inference/search.py", "vit_cli/serve/service.py"
MUTANTS = [
    Mutant(
        "zero-shot: the template is left out",
        "vit_common/files/labels.py",
        "[template.replace(_PLACE, each) for each in labels]",
        "[each for each in labels]",
        f"{_ZERO_SHOT}probabilities_are_those_of_transformers[fast]",
    ),
    Mutant(
        "zero-shot: features of texts are not of length one",
        "vit_flax/inference/zero_shot.py",
        "found.append(np.asarray(unit(embeds.astype(jnp.float32))))",
        "found.append(np.asarray(embeds.astype(jnp.float32)))",
        f"{_ZERO_SHOT}probabilities_are_those_of_transformers[fast]",
    ),
    Mutant(
        "tokens: the end of a text that is too long is not kept",
        "vit_common/files/tokenizer.py",
        "self._tokenizer.enable_truncation(max(most, added + 1))",
        "self._tokenizer.enable_truncation(max(most - 1, added + 1))",
        f"{_ZERO_SHOT}tokens_are_those_of_transformers[fast]",
    ),
    Mutant(
        "half of a pooling by attention is drawn at random",
        "convert/load.py",
        'tuple(start for start in may_lack if start != "pooler.")',
        "tuple(start for start in may_lack)",
        "tests/test_leftovers.py::test_pooling_by_attention_is_missing_as_a_whole_or_not_at_all",
    ),
    Mutant(
        "differential attention is drawn like any weight",
        "vit_flax/pretrained.py",
        'std = DIFFERENTIAL_STD if kind == "differential" else config.initializer_range',
        "std = config.initializer_range",
        "tests/test_kinds.py::test_both_twins_draw_new_weights_alike[differential]",
    ),
    Mutant(
        "the sums of integers forget how far the inputs were moved up",
        "vit_flax/int8/product.py",
        "mixed_dot_p.bind(moved, kernel) - _OFFSET * sums",
        "mixed_dot_p.bind(moved, kernel) - (_OFFSET - 1) * sums",
        f"{_INT8}products_of_integers_are_exact",
    ),
    Mutant(
        "sums of integers run over what float32 counts one by one",
        "vit_flax/int8/product.py",
        "2**24 // (128 * 127)",
        "2**24 // 127**2",
        f"{_INT8}products_of_integers_are_exact",
    ),
    Mutant(
        "the zero of a row of inputs is left in the products",
        "vit_flax/int8/layer.py",
        "integer_product(integers, kernel, sums) - zeros * sums",
        "integer_product(integers, kernel, sums)",
        f"{_INT8}a_layer_of_integers_is_that_of_rounded_inputs",
    ),
    Mutant(
        "the rows of all tokens share one range",
        "vit_flax/int8/layer.py",
        "jnp.max(inputs, axis=-1, keepdims=True)",
        "jnp.max(inputs, keepdims=True)",
        f"{_INT8}a_layer_of_integers_is_that_of_rounded_inputs",
    ),
    Mutant(
        "kernels under CLIP's names are not quantized",
        "vit_flax/int8/weights.py",
        "encoder/layers?/",
        "encoder/layer/",
        f"{_INT8}trees_of_other_names",
    ),
    Mutant(
        "what float32 cannot tell apart is not looked at again",
        SEARCH,
        "margin = (D + 8) * float(np.finfo(np.float32).eps)",
        "margin = 0.0",
        f"{_SEARCH}vectors_nearer_to_each_other_than_float32_can_tell[numpy]",
    ),
    Mutant(
        "of equal neighbours the later one comes first",
        SEARCH,
        "order = np.lexsort((places, -every))",
        "order = np.lexsort((-places, -every))",
        f"{_SEARCH}equal_images_come_in_their_order[numpy]",
    ),
    Mutant(
        "an index of another model is searched",
        "vit_cli/search/command.py",
        "if not cosine >= _SAME:",
        "if cosine < -2.0:",
        f"{_SEARCH}refusals",
    ),
    Mutant(
        "a full queue takes one more",
        SERVICE,
        "if self.waiting + images > limits.queue",
        "if self.waiting + images > limits.queue + 1",
        f"{_SERVE}a_full_queue_refuses_and_says_when_to_come_again",
    ),
    Mutant(
        "images of a client that went away are run",
        "vit_cli/serve/batcher.py",
        "there = [slot for slot in batch if not slot.gone.is_set()]",
        "there = [*batch]",
        f"{_SERVE}a_client_that_goes_away",
    ),
    Mutant(
        "every image is a batch of its own",
        "vit_cli/serve/batcher.py",
        "len(taken) < self._sizes[work]:",
        "len(taken) < 1:",
        f"{_SERVE}what_comes_while_the_device_is_busy_is_one_batch",
    ),
    Mutant(
        "large images are decoded",
        SERVICE,
        "if width * height > self.limits.pixels:",
        "if width * height > 1e12:",
        f"{_SERVE}what_is_refused",
    ),
    Mutant(
        "a page of the Web reaches the server by another name",
        "vit_cli/serve/app.py",
        "if known is not None and name.lower() not in known:",
        "if known is None and name.lower() not in [name.lower()]:",
        f"{_SERVE}more_that_is_refused",
    ),
    Mutant(
        "a model card is written over",
        "convert/save.py",
        "if not os.path.lexists(directory / CARD_NAME):",
        "if True:",
        f"{_HABITS}a_card_that_is_there_stays",
    ),
    Mutant(
        "--quiet keeps warnings back",
        "vit_cli/terminal/messages.py",
        '_ALWAYS = ("warning", "error")',
        '_ALWAYS = ("error",)',
        f"{_HABITS}quiet_leaves_warnings_and_errors",
    ),
    Mutant(
        "Ray: a batch of fewer images is compiled anew",
        "vit_flax/inference/ray_data.py",
        "pixels = self._blank.copy()",
        "pixels = self._blank[: len(images)].copy()",
        f"{_RAY}features_of_names_bytes_and_arrays",
    ),
    Mutant(
        "Ray: the images after a bad one move up",
        "vit_flax/inference/ray_data.py",
        "for i, row, fault in zip(good, made, faults, strict=True)",
        "for i, row, fault in zip(range(len(good)), made, faults, strict=True)",
        f"{_RAY}bad_images_are_rows_with_an_error",
    ),
    Mutant(
        "an NNX model in training mode drops nothing",
        "vit_flax/nnx/model.py",
        "train = any(not part.deterministic for part in parts)",
        "train = False",
        f"{_NNX}dropout_follows_the_mode_and_the_rngs",
    ),
    Mutant(
        "NNX: the module in the place of a part is not called",
        "vit_flax/nnx/parts.py",
        "return getattr(part, name)(*args, **kwargs)",
        "return run(*args, **kwargs)",
        f"{_NNX}a_head_of_another_kind",
    ),
    Mutant(
        "NNX: what the linen model does not know is taken",
        "vit_flax/nnx/model.py",
        "for path in flat if path not in known]",
        "for path in flat if path not in flat]",
        f"{_NNX}what_does_not_fit_is_refused",
    ),
    Mutant(
        "a text's tokens attend to those after them",
        "vit_flax/families/clip.py",
        "return jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))",
        "return jnp.ones((1, 1, tokens, tokens), bool)",
        f"{_CLIP}the_end_of_a_text_is_found_by_either_rule[49]",
    ),
    Mutant(
        "the older rule for the end of a text left out",
        "vit_torch/families/clip.py",
        "config.eos_token_id in (2, None)",
        "config.eos_token_id is None",
        f"{_CLIP}the_end_of_a_text_is_found_by_either_rule[2]",
    ),
    Mutant(
        "OpenAI's projection not transposed",
        "convert/formats/open_clip.py",
        'Rule("text_projection", "text_projection.weight", TRANSPOSE)',
        'Rule("text_projection", "text_projection.weight")',
        f"{_CLIP}files_of_openai_and_open_clip",
    ),
    Mutant(
        "a stem's kernel divided by timm's constant where Google's is meant",
        "vit_torch/parts/stems.py",
        "kernel = kernel / (variance.sqrt() + 1e-5)",
        "kernel = kernel * torch.rsqrt(variance + 1e-8)",
        f"{_STEMS}google",
    ),
    Mutant(
        "the odd pixel of a stem's padding in front",
        "vit_torch/parts/stems.py",
        "pads += (total // 2, total - total // 2)",
        "pads += (total - total // 2, total // 2)",
        f"{_STEMS}timm_in_both_twins[stages]",
    ),
    Mutant(
        "a first stage that halves the image",
        "vit_flax/parts/stems.py",
        "stride=2 if self.stage > 0 and i == 0 else 1",
        "stride=2 if self.stage == 1 or i == 0 else 1",
        f"{_STEMS}timm_in_both_twins[stages]",
    ),
    Mutant(
        "adapters on the first layer of each MLP alone",
        "vit_flax/training/lora.py",
        r"(?:intermediate|output)\.dense\.weight$",
        r"(?:intermediate)\.dense\.weight$",
        "tests/test_lora.py::test_both_layers_of_each_mlp",
    ),
    Mutant(
        "the border counted in the mean of an MBConv's shortcut",
        "vit_torch/parts/mbconv.py",
        "padding=1, count_include_pad=False",
        "padding=1, count_include_pad=True",
        _VITAMIN,
    ),
    Mutant(
        "no norm after the MBConv blocks",
        "vit_flax/parts/mbconv.py",
        'return channel_norm(self, "norm_out")(x)',
        'return x + 0 * channel_norm(self, "norm_out")(x)',
        _VITAMIN,
    ),
    Mutant(
        "ViTamin's MLP without its own norm",
        "vit_flax/model.py",
        "if self.config.use_mlp_input_norm:\n            hidden_states",
        "if False:\n            hidden_states",
        _VITAMIN,
    ),
    Mutant(
        "a batch norm folded without its mean",
        "convert/formats/stems.py",
        "(bias - mean * factor)",
        "(bias - mean)",
        "tests/test_stems.py::test_stems_with_batch_norms_in_both_twins",
    ),
    Mutant(
        "heads of key and value repeated one after the other",
        "convert/formats/timm/eva.py",
        "np.repeat(heads, groups, axis=0)",
        "np.concatenate([heads] * groups)",
        f"{_NEAREST}heads_that_share_those_of_key_and_value",
    ),
    Mutant(
        "layer scale on the MLP that has none",
        "convert/formats/timm/nearest.py",
        '"attn_only_layer_scale": config.has_layer_scale and not config.use_mlp_layer_scale',
        '"attn_only_layer_scale": False',
        f"{_NEAREST}timm_builds_what_is_written_for_it[rotary positions, registers, gated]",
    ),
    Mutant(
        "GELU's derivative without the density",
        "vit_flax/parts/gelu.py",
        "below + x * (_DENSITY * jnp.exp(-0.5 * x * x))",
        "below + x * (_DENSITY * jnp.exp(-0.25 * x * x))",
        "tests/test_step_cost.py::test_gelu_and_its_derivatives_are_those_of_torch",
    ),
    Mutant(
        "a program for another machine that follows this one's processor",
        HALF,
        "if elsewhere() and _forced.get() is None:",
        "if False:",
        f"{_HALF}a_program_for_another_machine_does_not_follow_this_one",
    ),
    Mutant(
        "a cotangent in float32 on bfloat16 units",
        HALF,
        "rounded_dot_p.bind(x, tangents[1], dimensions=dimensions)",
        "jax.lax.dot_general(x, tangents[1], dimensions)",
        f"{_HALF}every_product_of_a_network_and_of_its_gradient",
    ),
    Mutant(
        "rounding between products",
        HALF,
        "return dtype if operand_dtype(dtype) is None else jnp.float32",
        "return dtype",
        f"{_HALF}error_is_no_larger_than_that_of_rounding_after_every_operation",
    ),
    Mutant(
        "images and tokens as two axes in a CPU's products",
        "vit_flax/cpu/rows.py",
        'inputs.ndim <= 2 or targets() != ("cpu",)',
        "inputs.ndim <= 3",
        "tests/test_step_cost.py::test_gradients_of_kernels_copy_no_activation",
    ),
    Mutant(
        "offsets that are not on a logarithmic scale",
        "vit_common/positions.py",
        "np.sign(offsets) * np.log1p(np.abs(offsets))",
        "np.sign(offsets) * np.abs(offsets)",
        "tests/test_relative_mlp.py::test_both_twins_and_the_numpy_network_are_timms[class token]",
    ),
    Mutant(
        "the same share of the second map in every block",
        "vit_common/config.py",
        "0.8 - 0.6 * math.exp(-0.3 * i)",
        "0.8 - 0.6 * math.exp(-0.3 * 0)",
        "tests/test_differential.py::test_both_twins_and_the_numpy_network_are_timms",
    ),
    Mutant(
        "SigLIP's classifier on the pooled output",
        "vit_common/families/towers.py",
        "    classifier_has_pooler = False\n",
        "    classifier_has_pooler = True\n",
        f"{_SIGLIP}the_torch_twin_is_transformers_and_so_are_its_files"
        "[SiglipForImageClassification]",
    ),
    Mutant(
        "SigLIP's text by its first token",
        "vit_torch/families/siglip.py",
        "self.head(last_hidden_state[:, -1])",
        "self.head(last_hidden_state[:, 0])",
        f"{_SIGLIP}the_torch_twin_is_transformers_and_so_are_its_files[SiglipTextModel]",
    ),
    Mutant(
        "columns and rows of SigLIP 2's patches",
        "vit_torch/families/siglip.py",
        "patches.permute(0, 5, 1, 3, 2, 4)",
        "patches.permute(0, 5, 1, 4, 2, 3)",
        f"{_SIGLIP}the_torch_twin_is_transformers_and_so_are_its_files[Siglip2VisionModel]",
    ),
    Mutant(
        "SigLIP 2's patches with channels first",
        "convert/layouts.py",
        "[patches.swapaxes(1, 3).swapaxes(2, 3)]",
        "[patches.swapaxes(1, 3)]",
        f"{_SIGLIP}the_torch_twin_is_transformers_and_so_are_its_files[Siglip2VisionModel]",
    ),
    Mutant(
        "SigLIP 2's positions without antialias",
        "vit_common/config_fields.py",
        'SIGLIP2_VISION: "bilinear_antialias"',
        'SIGLIP2_VISION: "bilinear"',
        f"{_SIGLIP}siglip2_resamples_to_each_batch_and_leaves_padding_out",
    ),
    Mutant(
        "a ViT with other heads of pooling as a SigLIP",
        "vit_common/families/towers.py",
        "return same and usual and",
        "return same and",
        f"{_SIGLIP}a_vit_of_another_network_is_no_siglip",
    ),
    Mutant(
        "DINOv3's pixels rounded once for every tap",
        "vit_common/images/floats.py",
        "if apart.any() else once",
        "if False else once",
        "tests/test_dinov3.py::test_pixels_are_those_of_torch",
    ),
    Mutant(
        "keras-hub's first block under no number",
        "convert/formats/keras_hub.py",
        'name.replace(f"{_FIRST}/", f"{_FIRST}_0/")',
        'name.replace(f"{_FIRST}/", f"{_FIRST}_9/")',
        "tests/test_other_layouts.py::test_keras_hub[classifier]",
    ),
    Mutant(
        "tanh GELU",
        "vit_flax/parts/gelu.py",
        "def _gelu(x: jax.Array) -> jax.Array:\n    return jax.nn.gelu(x, approximate=False)",
        "def _gelu(x: jax.Array) -> jax.Array:\n    return jax.nn.gelu(x)",
        STAGES,
    ),
    Mutant(
        "exact GELU for gelu_new",
        TORCH_PART,
        '"gelu_new": lambda x: F.gelu(x, approximate="tanh")',
        '"gelu_new": lambda x: F.gelu(x)',
        f"{_PARITY}activations[float64-gelu_new]",
    ),
    Mutant(
        "quick GELU's factor",
        TORCH_PART,
        "1.702",
        "1.7",
        f"{_PARITY}activations[float64-quick_gelu]",
    ),
    Mutant(
        "pairs of channels turned backwards",
        ROTARY,
        "(a * cos - b * sin, b * cos + a * sin)",
        "(a * cos + b * sin, b * cos - a * sin)",
        f"{TURNED}[axial]",
    ),
    Mutant(
        "neighbours paired where halves are",
        ROTARY,
        "wide[..., 0::2], wide[..., 1::2]",
        "jnp.split(wide, 2, axis=-1)",
        f"{TURNED}[axial]",
    ),
    Mutant(
        "corners of patches for their centres",
        POSITIONS,
        "2.0 * (places + 0.5) / size - 1.0",
        "2.0 * places / size - 1.0",
        f"{TURNED}[DINOv3]",
    ),
    Mutant(
        "rows before columns",
        POSITIONS,
        "(columns, rows) if columns_first else (rows, columns)",
        "(rows, columns)",
        f"{TURNED}[mixed]",
    ),
    Mutant(
        "the first block's frequencies in every block",
        FLAX,
        "jax.tree.map(lambda array, i=i: array[i], owned)",
        "jax.tree.map(lambda array: array[0], owned)",
        f"{_ROTARY}frequencies_of_each_block_in_a_scan_and_under_a_mask",
    ),
    Mutant(
        "a key that is not rotated",
        TORCH,
        "key = rotate(key, rotation, self.config.rope_rotate_half)",
        "pass",
        f"{_FAMILIES}every_stage_against_the_torch_reference[dinov3,gated-(16,16)]",
    ),
    # A run of both frameworks sees what training code gets wrong most often.
    Mutant(
        "a clipping epsilon that was not asked for",
        OPTIMIZERS,
        'extra = 1e-6 if rule == "torch" else 0.0',
        "extra = 1e-6",
        RUN,
    ),
    Mutant(
        "weight decay by optax's default",
        OPTIMIZERS,
        "optax.add_decayed_weights(recipe.weight_decay, mask)",
        "optax.add_decayed_weights(1e-4, mask)",
        RUN,
    ),
    Mutant(
        "a schedule one step ahead",
        OPTIMIZERS,
        "jnp.clip(jnp.asarray(step), 0, steps - 1)",
        "jnp.clip(jnp.asarray(step) + 1, 0, steps - 1)",
        RUN,
    ),
    Mutant(
        "Adam's epsilon inside the root",
        OPTIMIZERS,
        "(jnp.sqrt(v / second) + eps)",
        "jnp.sqrt(v / second + eps**2)",
        RUN,
    ),
    Mutant(
        "weight decay in the gradient",
        OPTIMIZERS,
        "parts.append(_clip(recipe.clip, recipe.clip_rule))",
        "parts += [_clip(recipe.clip, recipe.clip_rule), "
        "optax.add_decayed_weights(recipe.weight_decay)]",
        RUN,
    ),
    Mutant(
        "tokens and positions spared by Transformers' rule",
        OPTIMIZERS,
        'return not norms and not any("bias" in part for part in path)',
        'return not norms and not any("bias" in part for part in path) and ndim == 2',
        RUN,
    ),
    Mutant(
        "the average keeps what it should leave",
        STEP,
        "return 1.0 - self.decay",
        "return self.decay",
        RUN,
    ),
    Mutant(
        "the average of the parameters before the step",
        STEP,
        "state.ema,\n                    moved,",
        "state.ema,\n                    chosen,",
        RUN,
    ),
    Mutant(
        "label smoothing over the other classes",
        LOSSES,
        "+ label_smoothing / K\n        if classes is not None:\n            targets",
        "+ label_smoothing / (K - 1)\n        if classes is not None:\n            targets",
        RUN,
    ),
    Mutant(
        "the final norm with the last block's rate",
        OPTIMIZERS,
        "layer = blocks if timm else top",
        "layer = blocks",
        RUN,
    ),
    Mutant(
        "rates from the wrong end of the network",
        TWIN_TRAINER,
        "recipe.layer_decay ** (last - depth)",
        "recipe.layer_decay**depth",
        f"{_RUNS}rates_and_decay_are_timms[timm]",
    ),
    Mutant(
        "the twin's cosine one step ahead",
        TWIN_TRAINER,
        "share = min((at - done) / (length - done), 1.0)",
        "share = min((at + 1 - done) / (length - done), 1.0)",
        f"{_RUNS}cosine_is_timms[after the warm-up]",
    ),
    Mutant(
        "the twin's clip without torch's epsilon",
        TWIN_TRAINER,
        'low = 1e-6 if self.recipe.clip_rule == "torch" else 0.0',
        "low = 0.0",
        f"{_RUNS}the_twin_trainer_is_a_plain_loop_over_torch_optim[AdamW, cosine]",
    ),
    Mutant(
        "the twin's parts are means of their own",
        TWIN_TRAINER,
        "loss = (losses * weights).sum() / counted",
        "loss = (losses * weights).sum() / weights.sum() / len(parts)",
        f"{_RUNS}a_batch_in_parts_is_the_batch",
    ),
    Mutant(
        "images that do not count do",
        TWIN_TRAINER,
        "weights = weights * (labels != IGNORED)\n        labels = F.one_hot",
        "labels = F.one_hot",
        f"{_RUNS}losses_are_torchs[classes]",
    ),
    Mutant(
        "trust where there is no weight decay",
        TWIN_TRAINER,
        'if group["weight_decay"]:\n                    update = update + ',
        "if True:\n                    update = update + ",
        f"{_RUNS}lamb_is_timms[0.0]",
    ),
    Mutant(
        "a schedule behind is never tried",
        DEFINITIONS,
        '{"schedule_offset": d.schedule_offset - 1}',
        '{"schedule_offset": d.schedule_offset}',
        CAUSE,
    ),
    Mutant(
        "biases of keys held like the others",
        "vit_torch/verify/training.py",
        'return name.endswith("attention.key.bias")',
        "return False",
        f"{_RUNS}biases_of_keys_are_judged_apart",
    ),
    Mutant(
        "equal logits all count as right",
        METRICS,
        "+ ((rows == own) & before).sum(axis=1)",
        "",
        f"{_METRICS}of_equal_logits_the_first_class_is_taken",
    ),
    Mutant(
        "a confidence on an edge is in the bin above",
        METRICS,
        "np.searchsorted(edges[1:-1], confidence)",
        'np.searchsorted(edges[1:-1], confidence, side="right")',
        f"{_METRICS}a_confidence_on_an_edge_is_in_the_bin_below",
    ),
    Mutant(
        "a model's classes in the order of the folders",
        EVALUATE,
        "return where[labels.astype(np.int64)], names, problem",
        "return labels.astype(np.int64), names, problem",
        f"{_EVALUATE}classes_are_matched_by_name",
    ),
    Mutant(
        "images that cannot be read are evaluated",
        EVALUATE,
        "index = np.flatnonzero(read)",
        "index = np.arange(count)",
        f"{_EVALUATE}what_cannot_be_read_is_left_out_and_named",
    ),
    Mutant(
        "neighbours vote without a temperature",
        PROBE,
        "np.exp(near / temperature)",
        "np.exp(near)",
        "tests/test_probe.py::test_weighted_neighbours_are_dino_s[5]",
    ),
    Mutant(
        "names are not escaped in a report",
        CHARTS,
        "return html.escape(str(value))",
        "return str(value)",
        "tests/test_training_report.py::test_names_are_escaped_everywhere",
    ),
    Mutant(
        "gradients are divided by all rows",
        STEP,
        "scale = rows / divide",
        "scale = rows / jnp.full_like(divide, rows)",
        f"{_STEP}parts_of_a_batch_take_the_step_of_the_whole",
    ),
    Mutant(
        "the average of the step before",
        STEP,
        "weight = ema.weight(state.step)",
        "weight = ema.weight(state.step + 1)",
        f"{_STEP}averages_are_those_of_timm[warmup]",
    ),
    Mutant(
        "a batch without labels moves the parameters",
        STEP,
        "good = finite & counted",
        "good = finite",
        f"{_STEP}a_batch_without_labels_that_count_changes_nothing",
    ),
    Mutant(
        "NaN in the parameters",
        STEP,
        "finite = jnp.isfinite(value) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(value)",
        f"{_STEP}what_is_not_finite_changes_nothing_but_the_count_of_steps[1]",
    ),
    Mutant(
        "label -1 is the last class",
        LOSSES,
        "wrong = ~ignored & ((labels < 0) | (labels >= K))",
        "wrong = ~ignored & (labels >= K)",
        f"{_LOSS}a_label_out_of_range_is_never_silent[-1]",
    ),
    Mutant(
        "class weights do not count",
        LOSSES,
        "count = rows if classes is None else rows * classes[labels]",
        "count = rows",
        f"{_LOSS}losses_are_those_of_torch_and_timm[class weights]",
    ),
    Mutant(
        "cutmix with an odd side",
        MIXING,
        "jnp.clip(y + (cut_h + 1) // 2, 0, height)",
        "jnp.clip(y + cut_h // 2, 0, height)",
        f"{_MIXED}mixed_batches_are_those_of_timm[True-0.9-center0]",
    ),
    Mutant(
        "mixed with an image that could not be read",
        MIXING,
        "each = mixes & counts[::-1]",
        "each = mixes & jnp.ones_like(counts)",
        f"{_MIXED}an_image_whose_partner_does_not_count_stays",
    ),
    Mutant(
        "the clip of torch without its epsilon",
        OPTIMIZERS,
        'extra = 1e-6 if rule == "torch" else 0.0',
        "extra = 0.0",
        f"{_RULES}updates_are_those_of_torch[clipped]",
    ),
    Mutant(
        "the final norm at another rate",
        OPTIMIZERS,
        "layer = blocks if timm else top",
        "layer = top",
        f"{_RULES}groups_are_those_of_timm[vit]",
    ),
    Mutant(
        "bias correction in four digits",
        OPTIMIZERS,
        "(-jnp.expm1(n * math.log(b)) if b else 1.0 for b in (b1, b2))",
        "(1.0 - b**n for b in (b1, b2))",
        f"{_RULES}the_first_steps_are_as_exact_in_float32",
    ),
    Mutant(
        "a warm-up one step off",
        "vit_common/recipes/schedule.py",
        "first + (peak - first) * at / before",
        "first + (peak - first) * (at + 1) / before",
        f"{_RULES}learning_rates_are_those_of_torch_transformers_and_timm[linear, warm-up]",
    ),
    Mutant(
        "digests of a checkpoint not compared",
        "vit_flax/training/checkpoints.py",
        "return None if _digest(arrays[name][index]) == digest else name",
        "return None",
        "tests/test_checkpoints_training.py::test_a_damaged_checkpoint_is_passed_over[flip]",
    ),
    Mutant(
        "a log that keeps what comes after the checkpoint",
        "vit_flax/training/logs.py",
        'if row["step"] <= step',
        'if row["step"]',
        "tests/test_training_logs.py::test_a_log_goes_on_after_a_step",
    ),
    Mutant(
        "a resumed run that begins its epoch anew",
        "vit_flax/training/fit.py",
        "self.loader.batches(epoch, start=start)",
        "self.loader.batches(epoch, start=0)",
        "tests/test_fine_tune.py::test_a_run_that_was_stopped_goes_on_to_the_bit",
    ),
    Mutant(
        "a head for other classes that is kept",
        "vit_flax/training/begin.py",
        "before != after and not _unnamed(before)",
        "False",
        "tests/test_fine_tune.py::test_heads_for_other_classes_are_replaced",
    ),
    Mutant(
        "a head that trains alone, run as a part of the model",
        "vit_flax/training/fit.py",
        "materialize=materialize if network is None else None,",
        "materialize=materialize,",
        "tests/test_head_training.py::test_the_head_that_comes_out_is_one_of_torch_trained_on_the_"
        "same_inputs",
    ),
    Mutant(
        "random turns left out, where the head's inputs are computed once",
        "vit_flax/training/tasks/head.py",
        '"affine": None,',
        "",
        "tests/test_head_training.py::test_images_that_are_drawn_anew_are_not_computed_once[affine]",
    ),
    Mutant(
        "two runs in one folder",
        "vit_flax/training/logs.py",
        "if take_lock(descriptor) is False:",
        "if take_lock(descriptor) is None:",
        "tests/test_fine_tune.py::test_two_runs_into_one_folder_are_refused",
    ),
    Mutant(
        "classes of validation from its own folder",
        "vit_common/datasets/open.py",
        "openers[name](limit=limit, **known)",
        "openers[name](limit=limit)",
        f"{_DATA}classes_come_from_training",
    ),
    Mutant(
        "class of a folder in another Unicode form",
        FOLDERS,
        'unicodedata.normalize("NFC", name)',
        "name",
        f"{_DATA}names_in_another_unicode_form_are_the_same_class",
    ),
    Mutant(
        "class indices as texts are sorted",
        TABLES,
        "sorted({index for value in indices for index in value})",
        "sorted({index for value in indices for index in value}, key=str)",
        f"{_DATA}what_a_label_is_found_out",
    ),
    Mutant(
        "negative labels count from the end",
        TABLES,
        "if any(index < 0 for index in value)",
        "if any(index < -100 for index in value)",
        f"{_DATA}labels_that_cannot_be_trained_on",
    ),
    Mutant(
        "the order of every epoch is the same",
        ORDER,
        "order = _permutation(n, seed, _ORDER, epoch)",
        "order = _permutation(n, seed, _ORDER, 0)",
        f"{_DATA}order_is_a_function_of_seed_and_epoch",
    ),
    Mutant(
        "repeats beyond the epoch",
        ORDER,
        "np.repeat(order[: -(-n // repeats)], repeats)[:n]",
        "np.tile(order[: -(-n // repeats)], repeats)[:n]",
        f"{_DATA}repeats_against_timm",
    ),
    Mutant(
        "a class may lose its only image to validation",
        ORDER,
        "_SPLIT, keep=1)",
        "_SPLIT)",
        f"{_DATA}split_of_few_images",
    ),
    Mutant(
        "draws without the repeat",
        "vit_common/augment/draws.py",
        "[0, index, epoch, repeat]",
        "[0, index, epoch, 0]",
        f"{_LOADER}repeats_have_draws_of_their_own",
    ),
    Mutant(
        "crops of uniform aspect",
        CROP,
        "math.exp(uniform(source, low, high))",
        "uniform(source, *ratio)",
        f"{_AUGMENT}crop_against_timm",
    ),
    Mutant(
        "a magnitude of its own sign",
        OPERATIONS,
        "-value if source.random() > 0.5 else value",
        "-value if source.random() < 0.5 else value",
        f"{_AUGMENT}operations_against_timm[ShearX-RGB]",
    ),
    Mutant(
        "colour jitter beside RandAugment",
        "vit_common/augment/pipeline.py",
        'if recipe.auto_augment and "3a" not in recipe.auto_augment:',
        "if False:",
        f"{_AUGMENT}whole_pipeline_against_timm[rand-m9-mstd0.5-inc1-bicubic]",
    ),
    Mutant(
        "rows that fill a batch count",
        LOADER,
        "(real & good).astype(np.float32)",
        "good.astype(np.float32)",
        f"{_LOADER}fewer_images_than_a_batch",
    ),
    Mutant(
        "images that cannot be read count",
        LOADER,
        "(real & good).astype(np.float32)",
        "real.astype(np.float32)",
        f"{_LOADER}images_that_cannot_be_read_are_skipped",
    ),
    Mutant(
        "a process reads the rows of another",
        LOADER,
        "range(index * share, (index + 1) * share)",
        "range(share)",
        f"{_LOADER}threads_and_processes_change_nothing[options0-1]",
    ),
    Mutant("eps", LAYERS, "epsilon=part.config.layer_norm_eps", "epsilon=1e-6", STAGES),
    Mutant(
        "variance",
        LAYERS,
        "variance = jnp.square(wide - mean).mean(-1, keepdims=True)",
        "variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)",
        OFFSET,
    ),
    Mutant(
        "derivative of the norm",
        LAYERS,
        "factor * (dx - dx.mean(-1, keepdims=True) - unit * along)",
        "factor * (dx - dx.mean(-1, keepdims=True))",
        "tests/test_norm.py",
    ),
    Mutant("scale of the query", FLAX_EAGER, "query.shape[-1] ** -0.5", "1.0", STAGES),
    Mutant(
        "scale by the width",
        TORCH_ATTENTION,
        "query.shape[-1] ** -0.5",
        "(query.shape[-1] * query.shape[-2]) ** -0.5",
        STAGES,
    ),
    Mutant(
        "softmax over the queries",
        TORCH_ATTENTION,
        "torch.softmax(scores, dim=-1)",
        "torch.softmax(scores, dim=-2)",
        STAGES,
    ),
    Mutant(
        "softmax in half precision",
        FLAX_EAGER,
        "statistics = jnp.promote_types(scores.dtype, jnp.float32)",
        "statistics = scores.dtype",
        SOFTMAX,
    ),
    Mutant(
        "query and key exchanged",
        FLAX_EAGER,
        '"bqad,bkad->baqk", query, key',
        '"bqad,bkad->baqk", key, query',
        STAGES,
    ),
    Mutant(
        "probabilities transposed",
        TORCH_ATTENTION,
        '"baqk,bkad->bqad"',
        '"bakq,bkad->bqad"',
        STAGES,
    ),
    Mutant(
        "position bias not given to the kernel",
        TORCH_ATTENTION,
        "attn_mask=None if bias is None else bias.to(query.dtype)",
        "attn_mask=None",
        KERNEL,
    ),
    Mutant(
        "axes that operands vary over forgotten",
        FLAX_PRIMITIVE,
        'kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma',
        "frozenset()",
        DEVICES,
    ),
    Mutant(
        "bias of other heads on each device",
        FLAX_PRIMITIVE,
        "        found = kernel(*local)\n        if not forward and shared",
        "        found = kernel(*local[:3], *(x[:, ::-1] for x in local[3:]))\n"
        "        if not forward and shared",
        SHARDED,
    ),
    Mutant(
        "heads of a model axis left to the compiler",
        FLAX_PRIMITIVE,
        "    if not left:\n        return _unchecked(kernel)\n",
        "    if manual:\n        return None\n",
        SHARDED,
    ),
    Mutant(
        "gradient of a shared bias from one device",
        FLAX_PRIMITIVE,
        "if not forward and shared:",
        "if False:",
        DEVICES,
    ),
    Mutant(
        "head mask rounded up",
        FLAX_EAGER,
        "probabilities * head_mask.astype(probabilities.dtype)",
        "probabilities * jnp.sign(head_mask).astype(probabilities.dtype)",
        HEAD_MASK,
    ),
    Mutant(
        "head mask of the first block",
        FLAX,
        "jax.tree.map(lambda array, i=i: array[i], owned)",
        "jax.tree.map(lambda array, i=i: array[0], owned)",
        HEAD_MASK,
    ),
    Mutant(
        "heads and their width exchanged",
        FLAX,
        "key = self.key(hidden_states).reshape(B, S, A, D // A)",
        "key = self.key(hidden_states).reshape(B, S, D // A, A).swapaxes(2, 3)",
        STAGES,
    ),
    Mutant(
        "patches by column",
        TORCH,
        "embeddings.flatten(2).transpose(1, 2)",
        "embeddings.transpose(2, 3).flatten(2).transpose(1, 2)",
        STAGES,
    ),
    Mutant(
        "bias of the MLP dropped",
        TORCH,
        "hidden_states = self.dense(hidden_states)  # (B, S, D)",
        "hidden_states = F.linear(hidden_states, self.dense.weight)",
        STAGES,
    ),
    Mutant(
        "first norm twice",
        FLAX,
        "self.layernorm_after(hidden_states)",
        "self.layernorm_before(hidden_states)",
        STAGES,
    ),
    Mutant(
        "final norm left out",
        TORCH,
        "last_hidden_state = self.layernorm(last_hidden_state)",
        "last_hidden_state = last_hidden_state * 1.0",
        STAGES,
    ),
    Mutant(
        "second token pooled",
        TORCH,
        "if mean else hidden_states[:, 0]",
        "if mean else hidden_states[:, 1]",
        POOLER,
    ),
    Mutant(
        "activation of the pooler left out",
        FLAX,
        "activation(self.config.pooler_act)(self.dense(pooled))",
        "self.dense(pooled)",
        POOLER,
    ),
    Mutant(
        "resize rule",
        FLAX,
        "resize_matrices(self.config.position_resize,",
        'resize_matrices("bilinear",',
        SIZES,
    ),
    Mutant(
        "rows and columns of the positions exchanged",
        TORCH,
        '"Hh,Ww,hwd->HWd"',
        '"Hh,Ww,whd->HWd"',
        SIZES,
    ),
    Mutant(
        "positions of the tokens after those of the patches",
        FLAX,
        "jnp.concatenate((positions[:, :k], table), axis=1)",
        "jnp.concatenate((table, positions[:, :k]), axis=1)",
        SIZES,
    ),
    Mutant(
        "class and distillation token exchanged",
        TORCH,
        '("cls_token", "distillation_token", "register_tokens")',
        '("distillation_token", "cls_token", "register_tokens")',
        DEIT,
    ),
    Mutant(
        "distillation logits of the class token",
        TORCH,
        "self.distillation_classifier(outputs.last_hidden_state[:, 1])",
        "self.distillation_classifier(outputs.last_hidden_state[:, 0])",
        DEIT,
    ),
    Mutant(
        "logits of the two classifiers added",
        FLAX,
        "(cls_logits + distillation_logits) / 2",
        "cls_logits + distillation_logits",
        DEIT,
    ),
    Mutant(
        "layer scale left out",
        FLAX,
        "self.layernorm_before(output)\n        if self.config.has_layer_scale:",
        "self.layernorm_before(output)\n        if self.config.has_layer_scale and post_norm:",
        DINOV2,
    ),
    Mutant(
        "layer scale of the other branch",
        TORCH,
        "output * self.lambda_2",
        "output * self.lambda_1",
        DINOV2,
    ),
    Mutant(
        "the norms of query and key exchanged",
        FLAX,
        "self.query_norm(query), self.key_norm(key)",
        "self.key_norm(query), self.query_norm(key)",
        f"{STRUCTURE}[all norms, gated]",
    ),
    Mutant(
        "the norm of the heads after their projection",
        TORCH,
        "        if self.config.use_attention_norm:\n            hidden_states = "
        "self.layernorm(hidden_states)\n        hidden_states = self.dense(hidden_states)",
        "        hidden_states = self.dense(hidden_states)\n        if "
        "self.config.use_attention_norm:\n            hidden_states = "
        "self.layernorm(hidden_states)",
        f"{STRUCTURE}[all norms, gated]",
    ),
    Mutant(
        "the tokens before the norm into the MLP beside attention",
        FLAX,
        "normed = normed[:, : self.front_tokens]",
        "normed = hidden_states[:, : self.front_tokens]",
        f"{STRUCTURE}[parallel, as published]",
    ),
    Mutant(
        "a norm before the MLP as well as after it",
        TORCH,
        "normed = hidden_states if post_norm else self.layernorm_after(hidden_states)",
        "normed = self.layernorm_after(hidden_states)",
        f"{STRUCTURE}[norms after]",
    ),
    Mutant(
        "the second branch on what the first has made",
        TORCH,
        "output = output + branch.transform(hidden_states)",
        "output = output + branch.transform(hidden_states + output)",
        f"{STRUCTURE}[two branches, no final norm]",
    ),
    Mutant(
        "an RMS norm's derivative without its second term",
        LAYERS,
        "dunit = factor * (dx - unit * (unit * dx).mean(-1, keepdims=True))",
        "dunit = factor * dx",
        "tests/test_norm.py::test_gradients_of_rms_are_those_of_torch[0.1]",
    ),
    Mutant(
        "a norm before the blocks with the head's rate",
        OPTIMIZERS,
        'elif "embeddings" in path or "pre_layernorm" in path:',
        'elif "embeddings" in path:',
        "tests/test_structure.py::test_rates_and_decay_of_the_parameters_are_timms"
        "[all norms, gated]",
    ),
    Mutant(
        "gate and values exchanged",
        FLAX,
        "gate, hidden_states = jnp.split",
        "hidden_states, gate = jnp.split",
        DINOV2,
    ),
    Mutant(
        "mean before the class token",
        TORCH,
        "torch.cat((hidden_states[:, 0], mean), dim=1)",
        "torch.cat((mean, hidden_states[:, 0]), dim=1)",
        DINOV2,
    ),
    Mutant(
        "registers behind the patches",
        TORCH,
        "(embeddings[:, :k], front[:, k:], embeddings[:, k:])",
        "(embeddings[:, :k], embeddings[:, k:], front[:, k:])",
        REGISTERS,
    ),
    Mutant(
        "registers in the mean",
        FLAX,
        "jnp.mean(hidden_states[:, config.first_pooled_token :], axis=1)",
        "jnp.mean(hidden_states[:, 1:], axis=1)",
        REGISTERS,
    ),
    Mutant(
        "position biases transposed",
        TORCH,
        "bias.permute(2, 0, 1)",
        "bias.permute(2, 1, 0)",
        BEIT,
    ),
    Mutant(
        "shared position bias dropped",
        FLAX,
        "bias = own if bias is None else bias + own",
        "bias = own",
        BEIT,
    ),
    Mutant(
        "mask inverted",
        TORCH,
        "embeddings * (1.0 - mask) + self.mask_token * mask",
        "embeddings * mask + self.mask_token * (1.0 - mask)",
        DECODER,
    ),
    Mutant(
        "order of the pixel shuffle",
        FLAX,
        "pixels.transpose(0, 3, 1, 4, 2, 5)",
        "pixels.transpose(0, 3, 1, 5, 2, 4)",
        DECODER,
    ),
    Mutant(
        "token slice off by one",
        TORCH,
        "outputs.last_hidden_state[:, first : first + rows * columns]",
        "outputs.last_hidden_state[:, first - 1 : first - 1 + rows * columns]",
        DECODER,
    ),
    Mutant(
        "sum over the channels",
        TORCH,
        "/ (mask.sum() + 1e-5) / config.num_channels",
        "/ (mask.sum() + 1e-5)",
        DECODER,
    ),
    Mutant(
        "sum of the losses",
        FLAX,
        "[:, 0]  # (B,)\n        return jnp.sum(",
        "[:, 0]  # (B,)\n        return jnp.sum(counted) * jnp.sum(",
        LOSS,
    ),
    Mutant("label to leave out", FLAX, "counted = labels != -100", "counted = labels != -1", LOSS),
    Mutant(
        "mean over all labels",
        FLAX,
        "[:, 0]  # (B,)\n        return jnp.sum(",
        "[:, 0]  # (B,)\n        return jnp.mean(counted) * jnp.sum(",
        LOSS,
    ),
    Mutant(
        "visual tokens of patches that are not masked",
        FLAX,
        "counted = (bool_masked_pos != 0) & (labels != -100)",
        "counted = labels != -100",
        TOKENS,
    ),
    Mutant(
        "scaling of stochastic depth",
        TORCH,
        "*(1 for _ in rest)), self.p)",
        "*(1 for _ in rest)), self.p) * (1.0 - self.p)",
        TRAINING,
    ),
    Mutant(
        "stochastic depth by channel",
        FLAX,
        "(B, *(1 for _ in rest)))",
        "(B, 1, rest[-1]))",
        TRAINING,
    ),
    Mutant(
        "attention dropout shared",
        FLAX,
        "nn.Dropout(self.config.attention_probs_dropout_prob)",
        "nn.Dropout(self.config.attention_probs_dropout_prob, broadcast_dims=(0, 1))",
        TRAINING,
    ),
    Mutant(
        "hidden dropout at the rate of the attention's",
        TORCH,
        "self.dropout = nn.Dropout(self.config.attention_probs_dropout_prob)",
        "self.dropout = nn.Dropout(self.config.hidden_dropout_prob)",
        TRAINING_DEIT,
    ),
    Mutant(
        "no dropout of the embeddings",
        FLAX,
        "row_major(self.dropout(embeddings, deterministic=deterministic))",
        "embeddings",
        TRAINING_DEIT,
    ),
    Mutant(
        "scan with the same masks in every block",
        STACKING,
        '"dropout": True}',
        '"dropout": False}',
        SCANNED_DRAWS,
    ),
    Mutant(
        "scan with the rates of stochastic depth from the back",
        STACKING,
        "jnp.asarray(rates) if any",
        "jnp.asarray(rates[::-1]) if any",
        SCANNED_TRAINING,
    ),
    Mutant(
        "scan with the head masks from the back",
        STACKING,
        "scan(layer, hidden_states, owned, layer_rates)",
        "scan(layer, hidden_states, jax.tree.map(lambda x: x[::-1], owned), layer_rates)",
        SCANNED,
    ),
    Mutant(
        "blocks stacked in the order of their names",
        STACKING,
        "for i in sorted(found)]",
        "for i in sorted(found, key=str)]",
        STACK,
    ),
    Mutant(
        "head mask lost in a kernel",
        FLAX_ATTENTION,
        '== "eager" or head_mask is not None or dropout',
        '== "eager" or dropout',
        f"{_ATTENTION}what_changes_probabilities_is_never_lost[head_mask-pallas]",
    ),
    Mutant(
        "float64 in a kernel of float32",
        FLAX_CHOICE,
        "dtype not in (jnp.bfloat16, jnp.float32)",
        "dtype == jnp.float16",
        f"{_ATTENTION}float64_stays_float64[pallas]",
    ),
    Mutant(
        "mean of the scores' gradient",
        TPU_ATTENTION,
        "weights * (d_weights - mean)",
        "weights * d_weights",
        WHOLE,
    ),
    Mutant(
        "gradient of the bias from one image",
        TPU_ATTENTION,
        "d_bias[0][h] += d_scores",
        "d_bias[0][h] = d_scores",
        WHOLE,
    ),
    Mutant(
        "keys past the end",
        TPU_ATTENTION,
        "jnp.where(known, scores, -jnp.inf)",
        "jnp.where(known, scores, 0.0)",
        TILED,
    ),
    Mutant(
        "sum of the tiles before",
        TPU_ATTENTION,
        "total = shrunk * totals[h, :, :1]",
        "total = totals[h, :, :1]",
        TILED,
    ),
    Mutant(
        "context of the tiles before",
        TPU_ATTENTION,
        "shrunk * context[:, lanes] + found",
        "context[:, lanes] + found",
        TILED,
    ),
    Mutant(
        "scale of a long query's gradient",
        TPU_ATTENTION,
        "_scaled(total[...], width).astype",
        "total[...].astype",
        TILED,
    ),
    Mutant(
        "biases of the last tokens for those in front",
        FLAX,
        "bias = bias[:, :, :F]",
        "bias = bias[:, :, S - F :]",
        f"{FRONT}[beit, biases of a block]",
    ),
    Mutant(
        "the first block cut, not the last",
        STACKING,
        "last if name == str(L - 1) else whole",
        "last if name == str(0) else whole",
        f"{FRONT}[vit]",
    ),
    Mutant(
        "image size: the grid of another size with as many patches",
        "convert/source.py",
        "trained.grid_size != settled.grid_size",
        "trained.num_patches != settled.num_patches",
        "tests/test_image_size.py::test_a_grid_of_as_many_patches_is_another_grid",
    ),
    Mutant(
        "image size: images are prepared for the old one",
        "convert/source.py",
        "return _at_size(source, found), PROCESSOR_NAME",
        "return found, PROCESSOR_NAME",
        "tests/test_image_size.py::test_dinov2s_images_follow_its_crop_and_not_its_positions",
    ),
    Mutant(
        "image size: the crop's shorter side alone",
        "vit_common/images/sizes.py",
        "max(rows, columns)",
        "rows",
        "tests/test_image_size.py::test_a_wide_crop_lies_inside_the_resized_image",
    ),
    Mutant(
        "masks: the ratio rounded down",
        MASKED,
        "math.ceil(self.squares * mask_ratio)",
        "int(self.squares * mask_ratio)",
        f"{_TASKS}masks_are_those_of_run_mim[32-8-0.6]",
    ),
    Mutant(
        "masked loss: rows that do not count",
        MASKED,
        "mask = mask * (jnp.asarray(batch",
        "mask = mask + 0 * (jnp.asarray(batch",
        f"{_TASKS}reconstruction_is_transformers_loss[ViT]",
    ),
    Mutant(
        "soft distillation divided by the batch alone, as timm's",
        DISTILL,
        "(T * T / pupil.shape[-1])",
        "(T * T)",
        f"{_TASKS}distillation_is_deits_loss[soft]",
    ),
    Mutant(
        "distillation: the labels teach the mean of both heads",
        DISTILL,
        "labelled, pupil = _Labelled(outputs.cls_logits), outputs.distillation_logits",
        "pupil = outputs.distillation_logits",
        f"{_TASKS}distillation_is_deits_loss[soft]",
    ),
    Mutant(
        "the teacher sees the student's normalisation",
        DISTILL,
        "if factor is not None and offset is not None:",
        "if False:",
        f"{_TASKS}the_teacher_sees_its_own_preprocessing[16]",
    ),
    Mutant(
        "affine: sheared the other way",
        CROP,
        "math.tan(math.radians(shear))",
        "-math.tan(math.radians(shear))",
        f"{_AUGMENT}affine_against_torchvision[L]",
    ),
    Mutant(
        "rsLoRA scales as LoRA does",
        "convert/adapters/settings.py",
        "return alpha / (math.sqrt(rank) if rslora else rank)",
        "return alpha / rank",
        f"{_ADAPTERS}outputs_and_names_are_those_of_peft[vit-rslora-]",
    ),
    Mutant(
        "DoRA's norm is that of the base weight",
        "convert/adapters/lowrank.py",
        "rows = out.reshape(len(out), -1)\n            norm = np.sqrt(np.square(rows)",
        "rows = out.reshape(len(out), -1)\n            norm = np.sqrt(np.square("
        "weight.reshape(rows.shape))",
        f"{_ADAPTERS}outputs_and_names_are_those_of_peft[vit-dora-]",
    ),
    Mutant(
        "an alpha pattern is not read",
        "convert/adapters/settings.py",
        "return _matched(self.alpha_pattern, layer, self.alpha)",
        "return self.alpha",
        f"{_ADAPTERS}outputs_and_names_are_those_of_peft[vit-patterns-]",
    ),
    Mutant(
        "halves of a SwiGLU share the first A",
        "convert/adapters/lowrank.py",
        "shared = first.alpha == second.alpha and np.array_equal(first.a, second.a)",
        "shared = first.alpha == second.alpha",
        f"{_ADAPTERS}halves_of_a_swiglu[an A each]",
    ),
    Mutant(
        "an adapter is trained at twice its scale",
        "vit_flax/training/lora.py",
        "new = kernel.astype(delta.dtype) + self._scale(layer) * delta",
        "new = kernel.astype(delta.dtype) + 2 * self._scale(layer) * delta",
        "tests/test_lora.py::test_training_is_that_of_peft[query and value]",
    ),
    Mutant(
        "B is split as the kernel's inputs are",
        "vit_flax/sharding.py",
        "kept = [*before, None, outputs]",
        "kept = [*before, None, inputs[-1]]",
        "tests/test_lora.py::test_an_adapter_lies_as_its_kernel_does",
    ),
]


def check_texts(mutants: list[Mutant]) -> list[str]:
    """What is wrong with the table: a text that is not there exactly once."""
    faults = []
    for mutant in mutants:
        found = (ROOT / mutant.file).read_text().count(mutant.old)
        if found != 1:
            faults.append(f"{mutant.name}: {found} times in {mutant.file}: {mutant.old!r}")
    return faults


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output, over a copy of the packages.

    In a child of this process, which has imported what others wrote: that takes longer than a test.
    """
    report = folder / "report.txt"
    child = os.fork()
    if child == 0:
        with report.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        # A file of the same length, written within the second, would not be compiled anew.
        sys.dont_write_bytecode = True
        # By name, also where a test is among the slow ones.
        options = ["-x", "-p", "no:cacheprovider", "--tb=line", "-m", "slow or not slow"]
        code = pytest.main([*options, *tests])
        import vit_flax
        import vit_torch

        for package in (vit_flax, vit_torch):
            if not Path(package.__file__).is_relative_to(folder):
                print(f"{package.__name__} is not the copy's: {package.__file__}")
                code = 3
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), report.read_text()


def import_others() -> None:
    """Import what the tests use and this project has not written; nothing is run."""
    # As tests/conftest.py sets it; torch reads it when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch", "jax", "flax.linen", "transformers", "safetensors.torch"):
        importlib.import_module(name)
    import transformers

    for family in ("ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters"):
        getattr(transformers, f"{family}Model")
    ours = {"vit_common", "vit_flax", "vit_torch", "convert"} & sys.modules.keys()
    assert not ours, f"{ours} must be imported from the copy"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant faults in the twins and run the tests.")
    parser.add_argument("texts", nargs="*", help="only mutants with one of these in their names")
    texts = parser.parse_args(arguments).texts
    chosen = [m for m in MUTANTS if not texts or any(text in m.name for text in texts)]
    if faults := check_texts(chosen):
        print(*faults, sep="\n")
        return 2
    started, survived = time.monotonic(), []
    import_others()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "copy"
        folder.mkdir()
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / part)
        (folder / "vit_convert").symlink_to("convert")
        code, output = run_tests(folder, sorted({m.test for m in chosen}))
        if code != 0:
            print(output, "the tests must pass before a fault is planted", sep="\n")
            return 2
        for mutant in chosen:
            file, begun = folder / mutant.file, time.monotonic()
            right = file.read_text()
            file.write_text(right.replace(mutant.old, mutant.new))
            code, output = run_tests(folder, [mutant.test])
            file.write_text(right)
            if code not in (0, 1):
                print(output, f"pytest could not run {mutant.test}", sep="\n")
                return 2
            said = "killed" if code == 1 else "SURVIVED"
            print(f"{said:9} {time.monotonic() - begun:5.1f} s  {mutant.file}  {mutant.name}")
            sys.stdout.flush()
            if code == 0:
                survived.append(mutant.name)
    killed = len(chosen) - len(survived)
    print(f"{killed} of {len(chosen)} killed, {time.monotonic() - started:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
