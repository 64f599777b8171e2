"""What may be left over of a checkpoint, and what is drawn: one rule for both twins and `convert`.

The files are written by Transformers, timm and torch; what they should give is their own forward.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from networks import make_config, randomize
from safetensors.torch import load_file, save_file
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.errors import CheckpointError, InputError
from vit_convert import convert
from vit_flax.inference import ImageClassifier, ImageEncoder
from vit_torch.pretrained import to_numpy

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
BASES = [vit_flax.FlaxAutoModel, vit_torch.AutoModel]
CLASSIFIERS = [
    vit_flax.FlaxAutoModelForImageClassification,
    vit_flax.FlaxViTForImageClassification,
    vit_torch.AutoModelForImageClassification,
    vit_torch.ViTForImageClassification,
]


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


def run(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(pixels()) if isinstance(model, torch.nn.Module) else pixels())


def weight(model: Any, name: str) -> np.ndarray:
    """A parameter of a Hub name, from either twin."""
    if isinstance(model, torch.nn.Module):
        return to_numpy(model.state_dict()[name])
    tree, (*owner, _) = model.params, name.split(".")
    for part in owner:
        tree = tree[part]
    return np.asarray(tree["kernel"]).T


@pytest.fixture(scope="module")
def reference():
    """Transformers' classifier of five classes."""
    config = transformers.ViTConfig(**make_config(num_hidden_layers=2).to_dict())
    return randomize(transformers.ViTForImageClassification(config)).eval()


def folder_of(path, model, change=None):
    """A folder that Transformers wrote, its weights changed."""
    model.save_pretrained(path)
    if change is not None:
        state = load_file(path / "model.safetensors")
        save_file(change(dict(state)), path / "model.safetensors", {"format": "pt"})
    return path


def refused(cls, path, *names, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        cls.from_pretrained(path, **options)
    text = str(error.value)
    assert str(path) in text
    assert all(name in text for name in names), text
    return text


# -- of the network


OVER = {
    "a third block": {"vit.encoder.layer.2.layernorm_before.weight": (48,)},
    "layer scale": {"vit.encoder.layer.0.lambda_1": (48,)},
    "a norm before the blocks": {"vit.norm_pre.weight": (48,), "vit.norm_pre.bias": (48,)},
    "norms of query and key": {"vit.encoder.layer.1.attention.q_norm.weight": (12,)},
    "pooling by attention": {
        "vit.attn_pool.latent": (1, 1, 48),
        "vit.attn_pool.q.weight": (48, 48),
    },
    "big_vision's pooling": {"vit.MAPHead_0.probe": (1, 1, 48)},
    "an adapter": {"vit.encoder.layer.0.adapter.down.weight": (8, 48)},
    "LoRA": {"vit.encoder.layer.0.attention.attention.query.lora_A.weight": (8, 48)},
    "registers": {"vit.embeddings.register_tokens": (1, 4, 48)},
    "prompts": {"vit.embeddings.prompt_embeddings": (1, 5, 48)},
    "nobody knows": {"vit.mystery.weight": (48, 48)},
}


@pytest.mark.parametrize("more", OVER.values(), ids=OVER)
def test_what_changes_the_network_is_never_left_over(tmp_path, reference, more):
    def change(state):
        return {**state, **{name: torch.ones(shape) for name, shape in more.items()}}

    path = folder_of(tmp_path, reference, change)
    names = [name.removeprefix("vit.") for name in more]
    for cls in (*BASES, *CLASSIFIERS, ImageClassifier, ImageEncoder):
        text = refused(cls, path, *names)
        assert "ignore=" in text
    with pytest.raises(CheckpointError) as error:
        convert(path, tmp_path / "out", to="flax")
    assert all(name in str(error.value) for name in names)
    assert not (tmp_path / "out").exists()
    # By the file's own names, as `convert` takes them.
    wanted = run(reference).logits
    ignore = [name.replace(".", r"\.") for name in more]
    convert(path, tmp_path / "out", to="flax", ignore=ignore)
    for cls in CLASSIFIERS[1::2]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = cls.from_pretrained(path, ignore=ignore)
        np.testing.assert_allclose(np.asarray(run(model).logits), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cls", [BASES[0], BASES[1], *CLASSIFIERS])
def test_fewer_blocks_where_they_are_asked_for(tmp_path, reference, cls):
    path = folder_of(tmp_path, reference)
    config = transformers.ViTConfig.from_pretrained(path, num_hidden_layers=1)
    theirs = transformers.ViTModel.from_pretrained(path, config=config, add_pooling_layer=False)
    for options in ({"num_hidden_layers": 1}, {"config": config}):
        with pytest.warns(UserWarning, match=r"not used: .*encoder\.layer\.1\."):
            model = cls.from_pretrained(path, **options)
        inner = run(model.vit if hasattr(model, "vit") else model)
        if "last_hidden_state" in inner:
            want = run(theirs).last_hidden_state
            np.testing.assert_allclose(np.asarray(inner[0]), want, rtol=0, atol=2e-5)


def test_integers_are_not_trained(tmp_path, reference):
    def change(state):
        return {
            **state,
            "vit.embeddings.counter": torch.arange(17),
            "vit.encoder.layer.0.attention.index": torch.ones(17, dtype=torch.bool),
        }

    path = folder_of(tmp_path, reference, change)
    for cls in CLASSIFIERS:
        with pytest.warns(UserWarning, match=r"not used: .*counter, .*index\.$"):
            cls.from_pretrained(path)


# -- heads


def wrapped(state, network: str, head: str, layers: int = 1):
    """The weights as a training script's own class has them; with a head of one layer or two."""
    out = {}
    for name, value in state.items():
        leaf = name.partition("classifier")[2]
        if name.startswith("vit."):
            out[network + name.removeprefix("vit.")] = value
        elif layers == 1:
            out[head + leaf] = value
        else:
            out[f"{head}.2{leaf}"] = value
            out[f"{head}.0{leaf}"] = torch.ones(48, 48) if value.ndim == 2 else torch.ones(48)
    return out


HEADS = [
    ("backbone.", "my_probe"),
    ("backbone.", "decoder.layers.0"),
    ("model.vit.", "model.top"),
    ("vit.", "score"),
    ("", "my_head.linear"),
]


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
@pytest.mark.parametrize(("network", "head"), HEADS)
def test_a_trained_head_is_found_or_refused(tmp_path, reference, network, head):
    """Under whatever name: right and said, or an error that names it; never drawn at random."""
    path = folder_of(tmp_path, reference, lambda state: wrapped(state, network, head))
    wanted = run(reference).logits
    for cls in CLASSIFIERS:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            try:
                model = cls.from_pretrained(path)
            except CheckpointError as error:
                model, said = None, str(error)
        if model is not None:
            np.testing.assert_allclose(np.asarray(run(model).logits), wanted, rtol=0, atol=2e-5)
            (message,) = messages
            said = str(message.message)
            assert "taken as the classifier: " in said
            assert head in said
            assert model.config.num_labels == 5
        else:
            assert f"{head}.weight (5, 48)" in said
            assert "num_labels=" in said
    assert (model is None) == (head in ("decoder.layers.0", "model.top", "score"))
    if model is None:
        with pytest.raises(CheckpointError, match=rf"{head}\.weight|no classifier"):
            ImageClassifier.from_pretrained(path)
        with pytest.raises(CheckpointError, match=rf"{head}\.weight"):
            convert(path, tmp_path / "out", to="hub")


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_the_callers_configuration_stays_as_it_is(tmp_path, reference, cls):
    path = folder_of(tmp_path, reference, lambda state: wrapped(state, "backbone.", "fc"))
    config = vit_flax.AutoConfig.from_pretrained(path, num_labels=2)
    with pytest.raises(CheckpointError, match=r"\(5, 48\) in the checkpoint and \(2, 48\)"):
        cls.from_pretrained(path, config=config)
    assert config.num_labels == 2


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_a_head_that_no_model_has_may_be_left_aside_by_those_who_say_so(tmp_path, reference, cls):
    path = folder_of(tmp_path, reference, lambda state: wrapped(state, "vit.", "probe", layers=2))
    for options in ({}, {"num_labels": 5}, {"ignore": [r"probe\.0\..*"]}):
        refused(cls, path, "probe.2.weight (5, 48)", "at random", **options)
    with pytest.raises(CheckpointError, match=r"probe\.2\.weight"):
        convert(path, tmp_path / "out", to="hub")
    for options, labels in (
        ({"num_labels": 3}, 3),
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, 3),
        ({"ignore_mismatched_sizes": True}, 5),
        ({"allow_missing": True}, 5),
        ({"ignore": [r"probe\..*"]}, 5),
        ({"ignore": r"probe\..*"}, 5),
    ):
        with pytest.warns(UserWarning, match="newly initialized") as said:
            model = cls.from_pretrained(path, **options)
        assert weight(model, "classifier.weight").shape == (labels, 48)
        (message,) = [str(w.message) for w in said]
        assert ("probe.2.weight" in message) == ("ignore" not in options)
    with pytest.raises(InputError, match="`ignore` must hold regular expressions; given '\\['"):
        cls.from_pretrained(path, ignore=["["])


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_what_is_left_beside_a_head_that_was_found(tmp_path, reference, cls):
    """A second layer before the classifier would be left out: its logits would be others."""

    def change(state):
        return {**state, "head_norm.weight": torch.ones(48), "head_norm.bias": torch.ones(48)}

    path = folder_of(tmp_path, reference, change)
    refused(cls, path, "head_norm.weight (48,)")
    wanted = run(reference).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cls.from_pretrained(path, ignore=["head_norm.*"])
    np.testing.assert_allclose(np.asarray(run(model).logits), wanted, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
@pytest.mark.parametrize("cls", BASES)
def test_a_base_model_leaves_a_head_aside(tmp_path, reference, cls):
    path = folder_of(tmp_path, reference, lambda state: wrapped(state, "vit.", "probe", layers=2))
    wanted = run(reference.vit).last_hidden_state
    with pytest.warns(UserWarning, match=r"not used: probe\.0\.bias, .*probe\.2\.weight\."):
        model = cls.from_pretrained(path, add_pooling_layer=False)
    np.testing.assert_allclose(np.asarray(run(model)[0]), wanted, rtol=0, atol=2e-5)
    encoder = ImageEncoder.from_pretrained(path)
    assert encoder.model.config.hidden_size == 48


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_a_base_checkpoint_gets_a_head_and_one_warning(tmp_path, reference, cls):
    """As google/vit-base-patch16-224-in21k and DINO's backbones; Transformers' own contract."""
    theirs = transformers.ViTModel(reference.config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialized") as said:
        model = cls.from_pretrained(tmp_path)
    (message,) = [str(w.message) for w in said]
    assert "newly initialized, so train them: classifier.weight, classifier.bias." in message
    assert "not used: pooler.dense.bias, pooler.dense.weight." in message
    assert weight(model, "classifier.weight").shape == (5, 48)


@pytest.mark.parametrize(
    "pair",
    [
        ("FlaxDeiTForImageClassification", "DeiTForImageClassification"),
        ("FlaxDeiTForImageClassificationWithTeacher", "DeiTForImageClassificationWithTeacher"),
    ],
)
def test_one_head_or_two_of_a_distilled_deit(tmp_path, pair):
    """A model of one kind of a file of the other would have a random head beside a trained one."""
    config = transformers.DeiTConfig(**make_config(num_hidden_layers=1).to_dict())
    teacher = "Teacher" in pair[1]
    written = "DeiTForImageClassification" + ("" if teacher else "WithTeacher")
    randomize(getattr(transformers, written)(config)).save_pretrained(tmp_path)
    for cls in (getattr(vit_flax, pair[0]), getattr(vit_torch, pair[1])):
        text = refused(cls, tmp_path, "at random", "classifier.weight (5, 48)")
        assert teacher or "ForImageClassificationWithTeacher" in text
        with pytest.warns(UserWarning, match="newly initialized"):
            cls.from_pretrained(tmp_path, num_labels=3)
        with pytest.warns(UserWarning, match="newly initialized"):
            cls.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


# -- other formats


def test_attention_pooling_of_timm(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool="map", **SIZES)
    path = tmp_path / "model.safetensors"
    # With positions of its own (`AttentionPoolLatent(pos_embed="abs")`), which no network of timm's
    # has.
    save_file({**randomize(model).state_dict(), "attn_pool.pos_embed": torch.ones(4, 48)}, path)
    options = {"format": "timm", "num_attention_heads": 4}
    for cls in (*BASES, *CLASSIFIERS, ImageClassifier):
        refused(cls, path, "attn_pool", **options)
    with pytest.raises(CheckpointError, match="attn_pool"):
        convert(path, tmp_path / "out", from_="timm", overrides={"num_attention_heads": 4})
    # The network under it is whole.
    wanted = model.forward_features(torch.tensor(pixels())).detach()
    twin = vit_torch.AutoModel.from_pretrained(
        path, ignore=[r"attn_pool\..*", r"(fc_norm|head)\..*"], add_pooling_layer=False, **options
    )
    np.testing.assert_allclose(run(twin)[0], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cls", CLASSIFIERS[1::2])
def test_pooling_by_attention_is_missing_as_a_whole_or_not_at_all(tmp_path, cls):
    """Half of it drawn at random is no network that anyone trained."""
    model = vit_torch.ViTForImageClassification(make_config(pooling="map"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")

    def written(kept):
        tensors = {name: tensor for name, tensor in state.items() if kept(name)}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    written(lambda name: "pooler.attention.key" not in name)
    refused(cls, tmp_path, "pooler.attention.key.weight", "missing", "allow_missing=True")
    written(lambda name: "pooler" not in name)
    with pytest.warns(UserWarning, match=r"newly initialized.*pooler\.probe"):
        cls.from_pretrained(tmp_path)
