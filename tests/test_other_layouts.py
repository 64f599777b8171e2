"""Files of other libraries with the same networks: Scenic's trees, big_vision's in other
containers, jimm's and keras-hub's. Each is written by the names that the library's code gives."""

from __future__ import annotations

import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import unflatten_dict
from peers import FLOAT64, assert_close, pixels, run_torch
from test_convert_google import google_forward, google_weights

import vit_torch
from vit_common.config import ViTConfig
from vit_convert.convert import convert


def nested(flat):
    return unflatten_dict({tuple(name.split("/")): value for name, value in flat.items()})


def scenic_weights(cls: bool):
    """Those of google_weights by the names of `scenic/projects/baselines/vit.py`, and as those."""
    weights = google_weights(cls=cls)
    place = "Transformer/posembed_input/pos_embedding"
    weights[place] = weights[place][:, : 16 + cls]
    named = {}
    for name, value in weights.items():
        for before, after in (
            ("LayerNorm_2", "LayerNorm_1"),
            ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
            ("MlpBlock_3", "MlpBlock_0"),
            ("head/", "output_projection/"),
        ):
            name = name.replace(before, after)
        named[name] = value
    return weights, named


@pytest.mark.parametrize("saved", ["train state", "optimizer", "orbax"])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_scenic(saved, classifier, tmp_path):
    weights, named = scenic_weights(classifier == "token")
    tree = nested(named)
    moments = nested({name: value + 1 for name, value in named.items()})
    path = tmp_path / "checkpoint_100"
    if saved == "optimizer":  # while Flax had its own optimizers
        state = {"optimizer": {"target": tree, "state": {"step": 100, "param_states": moments}}}
        path.write_bytes(serialization.to_bytes(state | {"global_step": 100}))
    else:
        state = {"params": tree, "opt_state": {"0": {"mu": moments}}, "global_step": 100}
        if saved == "orbax":
            ocp = pytest.importorskip("orbax.checkpoint")
            ocp.PyTreeCheckpointer().save(path, state)
        else:
            path.write_bytes(serialization.to_bytes(state | {"model_state": {}}))
    report = convert(path, tmp_path / "hub")
    assert report.format_from == "scenic"
    x = pixels()
    pool = "tok" if classifier == "token" else "gap"
    want = google_forward(weights, x.transpose(0, 2, 3, 1), big_vision=False, pool=pool)
    assert_close(run_torch(path, x), want, FLOAT64)
    assert_close(run_torch(tmp_path / "hub", x), want, FLOAT64)


@pytest.mark.parametrize("container", ["msgpack", "orbax"])
def test_big_vision_in_other_containers(container, tmp_path):
    weights = google_weights(big_vision=True, cls=False)
    text = {"txt/Embed_0/embedding": np.ones((9, 48), np.float32), "t": np.ones(1, np.float32)}
    tree = {"params": nested({f"img/{name}": value for name, value in weights.items()} | text)}
    if container == "msgpack":
        path = tmp_path / "checkpoint.msgpack"
        path.write_bytes(serialization.to_bytes(tree))
    else:
        path = tmp_path / "checkpoint"
        pytest.importorskip("orbax.checkpoint").PyTreeCheckpointer().save(path, tree)
    report = convert(path, tmp_path / "hub")
    assert report.format_from == "google"
    assert any("txt" in name for name in report.ignored)
    x = pixels()
    want = google_forward(weights, x.transpose(0, 2, 3, 1), big_vision=True, pool="gap")
    assert_close(run_torch(path, x), want, FLOAT64)


def test_jimm_writes_the_hubs_files_and_the_numbers_of_the_tokens(tmp_path):
    """jax-image-models 0.4.0 (its `save_pretrained`): compared with its own forward pass when this
    was written, 2.4e-7 apart in float32."""
    from safetensors.numpy import load_file, save_file

    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 36}
    for config, prefix in (
        (ViTConfig(**sizes, num_hidden_layers=1, image_size=16, patch_size=4), ""),
        (vit_torch.CLIPVisionConfig(**sizes, num_hidden_layers=1, image_size=16, patch_size=4),
         "vision_model."),
        (vit_torch.Dinov2Config(hidden_size=24, num_attention_heads=3, num_hidden_layers=1,
                                image_size=16, patch_size=4), ""),
    ):  # fmt: skip
        from vit_torch.auto import AutoImageModel

        place = tmp_path / config.model_type
        cls = AutoImageModel.classes[config.model_type]
        cls(config).save_pretrained(place)
        weights = load_file(place / "model.safetensors")
        weights[f"{prefix}encoder.vision_position_ids"] = np.arange(17, dtype=np.int32)[None]
        save_file(weights, place / "model.safetensors", {"format": "pt"})
        _, info = cls.from_pretrained(place, output_loading_info=True)
        assert not info["unexpected_keys"]
