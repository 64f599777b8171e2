"""Files of other libraries with the same networks: Scenic's trees, big_vision's in other
containers, jimm's and keras-hub's. Each is written by the names that the library's code gives."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from flax import serialization
from flax.traverse_util import unflatten_dict
from peers import FLOAT64, assert_close, pixels, run_torch
from test_convert_google import google_forward, google_weights

import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError
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


KERAS = {
    "embedding": "vi_t_patching_and_embedding/patch_embedding",
    "Transformer/encoder_norm": "vi_t_encoder/layer_norm",
    "LayerNorm_0": "layer_norm_1",
    "LayerNorm_2": "layer_norm_2",
    "MultiHeadDotProductAttention_1/query": "mha/query_dense",
    "MultiHeadDotProductAttention_1/key": "mha/key_dense",
    "MultiHeadDotProductAttention_1/value": "mha/value_dense",
    "MultiHeadDotProductAttention_1/out": "mha/output_dense",
    "MlpBlock_3/Dense_0": "mlp/dense_1",
    "MlpBlock_3/Dense_1": "mlp/dense_2",
}
LEAVES = {"kernel": 0, "scale": 0, "bias": 1}


def keras_names(weights, backbone):
    """By the paths that `save_weights` of keras-hub 0.32 gives the layers of its ViT."""
    named = {}
    for name, value in weights.items():
        *path, leaf = name.split("/")
        module = "/".join(path)
        if name == "cls":
            named[f"{backbone}layers/vi_t_patching_and_embedding/vars/0"] = value
        elif leaf == "pos_embedding":
            place = "layers/vi_t_patching_and_embedding/position_embedding/vars/0"
            named[backbone + place] = value[0]
        elif module in ("head", "pre_logits"):
            last = "pre_logits/kernel" in weights and module == "head"
            named[f"layers/dense{'_1' * last}/vars/{LEAVES[leaf]}"] = value
        elif module.startswith("Transformer/encoderblock_"):
            number, inner = path[1].removeprefix("encoderblock_"), "/".join(path[2:])
            block = "vi_t_encoder_block" + (f"_{number}" if number != "0" else "")
            place = f"layers/vi_t_encoder/encoder_layers/{block}/{KERAS[inner]}"
            named[f"{backbone}{place}/vars/{LEAVES[leaf]}"] = value
        else:
            named[f"{backbone}layers/{KERAS[module]}/vars/{LEAVES[leaf]}"] = value
    return named


@pytest.mark.parametrize("kind", ["classifier", "pre_logits", "preset"])
def test_keras_hub(kind, tmp_path):
    h5py = pytest.importorskip("h5py")
    weights = google_weights(pre_logits=40 if kind == "pre_logits" else None)
    named = keras_names(weights, "" if kind == "preset" else "layers/vi_t_backbone/")
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        for name, value in named.items():
            if kind != "preset" or not name.startswith("layers/dense"):
                file[name] = np.asarray(value, np.float32)
        file["optimizer/vars/0"] = np.int32(3)
    x = pixels()
    tanh = {"hidden_act": "gelu_pytorch_tanh"}  # as in the forward pass below; Keras's is exact
    if kind == "preset":  # its classifier is in a file of its own
        sizes = {"image_shape": [32, 32, 3], "layer_norm_epsilon": 1e-6, "num_heads": 3}
        table = {"module": "keras_hub.src.models.vit.vit_backbone", "class_name": "ViTBackbone"}
        table |= {"config": sizes, "registered_name": "keras_hub>ViTBackbone"}
        (tmp_path / "config.json").write_text(json.dumps(table))
        read = vit_torch.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
        assert (read.config.image_size, read.config.layer_norm_eps) == (32, 1e-6)
        assert read.config.hidden_act == "gelu"
        model = vit_torch.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, **tanh)
        weights["head/kernel"], weights["head/bias"] = np.eye(48), np.zeros(48)
        found = model.double()(torch.tensor(x)).last_hidden_state[:, 0].detach().numpy()
    else:
        with pytest.raises(CheckpointError, match="`layer_norm_eps` is not in these weights"):
            convert(path, tmp_path / "hub")
        given = {"layer_norm_eps": 1e-6}
        report = convert(path, tmp_path / "hub", overrides={**given, **tanh})
        assert report.format_from == "keras-hub"
        found = run_torch(tmp_path / "hub", x)
        exact = vit_torch.AutoModelForImageClassification.from_pretrained(path, **given)
        assert (exact.config.hidden_act, exact.config.num_attention_heads) == ("gelu", 3)
    want = google_forward(weights, x.transpose(0, 2, 3, 1), big_vision=False, pool="tok")
    assert_close(found, want, FLOAT64)


def test_h5py_is_named_where_it_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"h5py is needed.*pip install h5py"):
        convert(tmp_path / "a.h5", tmp_path / "hub")
