"""`from_pretrained(image_size=...)`: positions resampled by the rule of the checkpoint, and images
prepared for the new size."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from peers import RESIZED, assert_close, pixels, randomise, run_peer
from safetensors.numpy import load_file
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, InputError
from vit_common.images.processor import ViTImageProcessor
from vit_common.images.processors import BitImageProcessor
from vit_common.images.sizes import processor_at_size
from vit_convert import convert
from vit_convert.source import find_processor, open_source
from vit_flax.inference import ImageClassifier, ImageEncoder

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "attn_implementation": "eager",
}
# HF's own class -> further fields
FAMILIES = {
    "ViT": {},
    "DeiT": {},
    "Beit": {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "Dinov2": {},
    "Dinov2WithRegisters": {"num_register_tokens": 3},
}
LARGER, WIDE = (48, 48), (24, 56)


def theirs(family: str, **fields):
    """A classifier of Transformers, every parameter random, in float64."""
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family], **fields})
    return randomise(getattr(transformers, f"{family}ForImageClassification")(config)).double()


def logits_of(model, x: np.ndarray, **options) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(x), **options).logits.numpy()


def interpolated(family: str, model, x: np.ndarray) -> np.ndarray:
    """What Transformers gives for images of another size than the model's."""
    options = {} if family.startswith("Dino") else {"interpolate_pos_encoding": True}
    return logits_of(model, x, **options)


def load(place, size, framework: str = "torch"):
    if framework == "torch":
        return vit_torch.AutoModelForImageClassification.from_pretrained(
            place, image_size=size, dtype=torch.float64
        )
    return vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
        place, image_size=size, precision="highest"
    )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("DeiT", "Dinov2") else ())
        for name in FAMILIES
    ],
)
def test_positions_are_resampled_as_transformers_interpolates_them(family, tmp_path):
    """There and back, as one fine-tunes at 384 and goes back to 224; both twins."""
    peer = theirs(family)
    peer.save_pretrained(tmp_path / "native")
    place = tmp_path / "native"
    for size in (WIDE, LARGER):
        x = pixels(size)
        want = interpolated(family, peer, x)
        model = load(place, size)
        assert model.config.image_height_width == size
        assert_close(logits_of(model, x), want, 1e-6)
    flax = load(place, size, "flax")
    assert flax.config.image_height_width == size
    assert_close(np.asarray(flax(jnp.asarray(x, jnp.float32)).logits), want, 1e-5)
    model.save_pretrained(tmp_path / "larger")
    again = getattr(transformers, f"{family}ForImageClassification").from_pretrained(
        tmp_path / "larger", dtype=torch.float64, attn_implementation="eager"
    )
    x = pixels((32, 32))
    want = interpolated(family, again.eval(), x)
    assert_close(logits_of(load(tmp_path / "larger", 32), x), want, 1e-6)


@pytest.mark.parametrize("family", ["Beit", "BeitShared"])
def test_tables_alone_are_resampled(family, tmp_path):
    """BEiT as it is published: relative positions and no others; shared by all blocks in
    pretraining."""
    shared = family == "BeitShared"
    peer = theirs(
        "Beit",
        use_absolute_position_embeddings=False,
        use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared,
    )
    peer.save_pretrained(tmp_path)
    x = pixels(WIDE)
    assert_close(logits_of(load(tmp_path, WIDE), x), interpolated("Beit", peer, x), 1e-6)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:.*searchsorted")  # timm's
@pytest.mark.parametrize("described", [True, False])
def test_timm_checkpoints_are_resampled_as_timm_does(described, tmp_path):
    """From timm's folder, and from a state dict alone, whose shapes say the size."""
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "patch_size": 8}
    peer = randomise(timm.models.VisionTransformer(img_size=32, **sizes)).double()
    place, options = tmp_path / "timm", {}
    if described:
        peer.pretrained_cfg = {**peer.pretrained_cfg} if hasattr(peer, "pretrained_cfg") else {}
        place.mkdir()
        cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875}
        table = {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 5,
            "model_args": {**sizes, "img_size": 32},
            "pretrained_cfg": cfg,
        }
        (place / "config.json").write_text(json.dumps(table))
        torch.save(peer.state_dict(), place / "pytorch_model.bin")
    else:
        place = tmp_path / "weights.pth"
        torch.save(peer.state_dict(), place)
        options = {"num_attention_heads": 4}
    for size in ((48, 48), (24, 56)):
        x = pixels(size)
        larger = timm.models.VisionTransformer(img_size=size, **sizes)
        state = timm.models.vision_transformer.checkpoint_filter_fn(dict(peer.state_dict()), larger)
        larger.load_state_dict(state)
        model = vit_torch.ViTForImageClassification.from_pretrained(
            place, image_size=size, dtype=torch.float64, **options
        )
        assert_close(logits_of(model, x), run_peer(larger.double().eval(), x), RESIZED)
    with open_source(place, overrides={"image_size": 48, **options}) as source:
        found = find_processor(source)
    if described:
        # timm: floor(48 / 0.875), and not what 36 pixels grow to.
        assert found[0].size == {"shortest_edge": 54}
        assert found[0].crop_size == {"height": 48, "width": 48}


def test_a_grid_of_as_many_patches_is_another_grid(tmp_path):
    """16 patches are 4 x 4, or 2 x 8."""
    peer = theirs("ViT")
    peer.save_pretrained(tmp_path)
    x = pixels((16, 64))
    assert_close(logits_of(load(tmp_path, (16, 64)), x), interpolated("ViT", peer, x), 1e-6)


def test_a_size_that_only_corrects_the_configuration_changes_no_weight(tmp_path):
    peer = theirs("ViT")
    peer.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "image_size": 64}))
    model = load(tmp_path, 32)
    name = "vit.embeddings.position_embeddings"
    np.testing.assert_array_equal(model.state_dict()[name], peer.state_dict()[name])
    with open_source(tmp_path, overrides={"image_size": 32}) as source:
        assert source.trained is None


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("size", [36, (32, 12)])
def test_a_size_that_the_patch_does_not_divide_is_refused(size, framework, tmp_path):
    theirs("ViT").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # refused before weights are looked at
    with pytest.raises(InputError, match="`image_size` must be a multiple of the patch") as error:
        load(tmp_path, size, framework)
    assert "\n" not in str(error.value)


def test_other_shapes_are_still_an_error(tmp_path):
    """A configuration given as an object is that of the weights."""
    theirs("ViT").save_pretrained(tmp_path)
    config = ViTConfig(**{k: v for k, v in SMALL.items() if k != "attn_implementation"})
    config.image_size = 48
    with pytest.raises(CheckpointError, match="the shapes did not match"):
        vit_torch.ViTForImageClassification.from_pretrained(tmp_path, config=config)


def test_encoders_prepare_images_of_the_new_size(tmp_path):
    peer = theirs("ViT")
    peer.save_pretrained(tmp_path)
    transformers.DeiTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    picture = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    )
    for cls in (ImageEncoder, ImageClassifier):
        encode = cls.from_pretrained(tmp_path, image_size=48, mesh=None)
        assert encode.image_size == (48, 48)
        assert encode.image_processor.size == {"height": 54, "width": 54}
        want = transformers.DeiTImageProcessor(
            size={"height": 54, "width": 54}, crop_size={"height": 48, "width": 48}
        )(picture, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(encode.prepare(picture), want, atol=1e-5)
    assert encode(picture)[0].probability > 0


def test_dinov2s_images_follow_its_crop_and_not_its_positions(tmp_path):
    """Its positions are of 518 pixels, and its images of 224."""
    theirs("Dinov2", image_size=64).save_pretrained(tmp_path)
    transformers.BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    encode = ImageClassifier.from_pretrained(tmp_path, image_size=48, mesh=None)
    assert encode.image_size == (48, 48)
    assert encode.image_processor.size == {"shortest_edge": 54}
    assert encode.image_processor.crop_size == {"height": 48, "width": 48}


def test_a_wide_crop_lies_inside_the_resized_image():
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )
    ours = BitImageProcessor.from_dict(processor.to_dict())
    wide = processor_at_size(ours, (32, 32), (32, 64))
    assert wide.size == {"shortest_edge": 72}
    picture = np.full((40, 40, 3), 255, np.uint8)
    assert wide(picture, return_tensors="np", do_normalize=False)["pixel_values"].min() > 0.99
    plain = ViTImageProcessor(size={"height": 32, "width": 32})
    assert processor_at_size(plain, (32, 32), (24, 56)).size == {"height": 24, "width": 56}


def test_a_conversion_and_a_load_resample_alike(tmp_path):
    theirs("ViT").save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", image_size=48)
    want = load_file(tmp_path / "b" / "model.safetensors")
    model = vit_torch.ViTForImageClassification.from_pretrained(tmp_path / "a", image_size=48)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), want[name].astype(np.float32))
