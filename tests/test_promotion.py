"""No dtype is widened by accident: every network and its gradient under strict promotion.

In float32: other dtypes say where "float32 or wider" is wanted by `promote_types`, which strict
promotion refuses by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_flax

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 16}
SIZES |= {"patch_size": 4, "num_labels": 5}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1}
LABELS = {"labels": np.array([1, -100], np.int32)}
SEVERAL = {"labels": np.ones((2, 5), np.float32)}
MASK = {"bool_masked_pos": np.array([[True, False] * 8] * 2)}
# class, fields of its configuration, inputs besides the images
CASES = {
    "vit": ("ViTForImageClassification", {}, LABELS),
    "vit, dropout": (
        "ViTForImageClassification",
        DROPOUT,
        {**LABELS, "train": True, "dropout_rng": jax.random.key(0)},
    ),
    "vit, another size": ("ViTModel", {}, {"interpolate_pos_encoding": True}),
    "vit, several labels": (
        "ViTForImageClassification",
        {},
        {"labels": np.ones((2, 5), np.float32)},
    ),
    "vit, decoder": ("ViTForMaskedImageModeling", {"encoder_stride": 4}, MASK),
    "deit": ("DeiTForImageClassificationWithTeacher", {}, {}),
    "beit": ("BeitForImageClassification", {"use_relative_position_bias": True}, LABELS),
    "beit, tokens": ("BeitForMaskedImageModeling", {"use_mask_token": True}, MASK),
    "dinov2, gated": ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}, LABELS),
    "registers": ("Dinov2WithRegistersForImageClassification", {}, LABELS),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_promoted_by_accident(name):
    """Traced and not compiled: what promotes is refused while it is traced."""
    cls, fields, inputs = CASES[name]
    cls = getattr(vit_flax, f"Flax{cls}")
    with jax.numpy_dtype_promotion("strict"):
        config = cls.config_class(**SIZES, **fields)
        model = cls(config, _do_init=False)
        side = 24 if "interpolate_pos_encoding" in inputs else 16
        pixels = np.zeros((2, 3, side, side), np.float32)

        def loss(params):
            found = model(pixels, params=params, **inputs)
            found = found.get("loss", found[0])
            return found.sum()

        got = jax.eval_shape(jax.grad(loss), model.params_shape_tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
