"""The `Auto` classes of both twins, on directories that Transformers 4.57.6 and we wrote."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from networks import random_weights, randomize, torch_twin
from tolerances import BOUNDS

import vit_flax
import vit_torch
from vit_common import families
from vit_common.config import AutoConfig, ViTConfig
from vit_common.errors import ConfigError, InputError, MissingFileError
from vit_torch.parity import difference
from vit_torch.pretrained import to_numpy

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
FAMILIES = ("ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters")
MODEL_TYPES = {family: getattr(transformers, f"{family}Config").model_type for family in FAMILIES}
AUTO: dict[str, tuple[Any, Any]] = {
    "Model": (vit_flax.FlaxAutoModel, vit_torch.AutoModel),
    "ForImageClassification": (
        vit_flax.FlaxAutoModelForImageClassification,
        vit_torch.AutoModelForImageClassification,
    ),
    "ForMaskedImageModeling": (
        vit_flax.FlaxAutoModelForMaskedImageModeling,
        vit_torch.AutoModelForMaskedImageModeling,
    ),
}
KINDS = [
    (family, kind)
    for family in FAMILIES
    for kind in AUTO
    if kind != "ForMaskedImageModeling" or family in ("ViT", "DeiT")
]


def fields_of(family: str) -> dict[str, Any]:
    more: dict[str, Any] = {} if "Dinov2" in family else {"intermediate_size": 36}
    return {**SMALL, **more, **({"encoder_stride": 4} if family in ("ViT", "DeiT") else {})}


def reference(family: str, name: str) -> Any:
    """Transformers' model of that class, every parameter random."""
    config = getattr(transformers, f"{family}Config")(**fields_of(family))
    return randomize(getattr(transformers, name)(config))


def pixels(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, 16, 16)).astype(np.float32)


def first(output) -> np.ndarray:
    value = output[0]
    return to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)


@pytest.mark.parametrize(("family", "kind"), KINDS, ids="".join)
def test_the_class_is_that_of_the_directory(family, kind, tmp_path):
    theirs = reference(family, family + kind)
    theirs.save_pretrained(tmp_path / "theirs")
    flax_auto, torch_auto = AUTO[kind]
    twin = torch_auto.from_pretrained(tmp_path / "theirs")
    assert type(twin) is getattr(vit_torch, family + kind)
    assert not twin.training
    twin.save_pretrained(tmp_path / "ours", to="flax")
    ours = flax_auto.from_pretrained(tmp_path / "ours")
    assert type(ours) is getattr(vit_flax, f"Flax{family}{kind}")
    x = torch.tensor(pixels())
    with torch.no_grad():
        stage = difference(kind, first(twin(x)), first(theirs(x)))
    assert stage.max_abs <= BOUNDS["reference float32"], stage
    for name, config in (("ours", ours.config), ("theirs", twin.config)):
        read = AutoConfig.from_pretrained(tmp_path / name)
        assert type(read) is type(config) is getattr(vit_torch, f"{family}Config")
        assert read.model_type == MODEL_TYPES[family]


@pytest.mark.parametrize("to", ["hub", "flax"])
def test_a_deit_with_both_heads_is_loaded_with_both(to, tmp_path):
    theirs = reference("DeiT", "DeiTForImageClassificationWithTeacher")
    theirs.save_pretrained(tmp_path / "theirs")
    twin = vit_torch.AutoModelForImageClassification.from_pretrained(tmp_path / "theirs")
    assert type(twin) is vit_torch.DeiTForImageClassificationWithTeacher
    twin.save_pretrained(tmp_path / "ours", to=to)
    ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
        tmp_path / "ours", precision="highest"
    )
    assert type(ours) is vit_flax.FlaxDeiTForImageClassificationWithTeacher
    x = pixels()
    with torch.no_grad():
        want = theirs(torch.tensor(x))
        got = twin(torch.tensor(x))
    mine = ours(x)
    for name in ("logits", "cls_logits", "distillation_logits"):
        for output in (got, mine):
            stage = difference(name, np.asarray(output[name]), want[name])
            assert stage.max_abs <= BOUNDS["reference float32"], stage
    # The base network of the same directory, without either head.
    for auto, wanted in (
        (vit_torch.AutoModel, vit_torch.DeiTModel),
        (vit_flax.FlaxAutoModel, vit_flax.FlaxDeiTModel),
    ):
        with pytest.warns(UserWarning, match=r"newly initialized.*pooler\.dense.*not used: cls_cl"):
            model = auto.from_pretrained(tmp_path / "ours")
        assert type(model) is wanted


def test_an_extended_vit_is_a_vit(tmp_path):
    config = ViTConfig(**fields_of("ViT"), num_register_tokens=2, position_tokens="cls")
    weights = random_weights(config, "classifier")
    torch_twin(vit_torch.ViTForImageClassification, config, weights).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit_extended"
    for auto, wanted in (
        (AUTO["ForImageClassification"][0], vit_flax.FlaxViTForImageClassification),
        (AUTO["ForImageClassification"][1], vit_torch.ViTForImageClassification),
    ):
        model = auto.from_pretrained(tmp_path)
        assert type(model) is wanted
        assert model.config.num_register_tokens == 2


def test_arguments_reach_the_model(tmp_path):
    reference("Dinov2", "Dinov2ForImageClassification").save_pretrained(tmp_path)
    twin = vit_torch.AutoModelForImageClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", output_attentions=True
    )
    assert twin.dtype is torch.bfloat16
    assert twin.attn_implementation == "eager"
    assert twin.config.output_attentions
    config = AutoConfig.from_pretrained(tmp_path, drop_path_rate=0.2)
    assert config.drop_path_rate == 0.2
    ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(tmp_path, config=config)
    assert ours.config is config
    with pytest.warns(UserWarning, match="newly initialized because the shapes did not match"):
        other = vit_torch.AutoModelForImageClassification.from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True
        )
    assert other.classifier.out_features == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_models_from_a_configuration(family):
    config = getattr(transformers, f"{family}Config")(**fields_of(family))
    for kind, (_, torch_auto) in list(AUTO.items())[:2]:
        twin = torch_auto.from_config(config)
        assert type(twin) is getattr(vit_torch, family + kind)
        assert twin.config.hidden_size == 24
    own = AutoConfig.for_model(MODEL_TYPES[family], **fields_of(family))
    assert type(own) is getattr(vit_torch, f"{family}Config")
    ours = vit_flax.FlaxAutoModel.from_config(own, _do_init=False)
    assert type(ours) is getattr(vit_flax, f"Flax{family}Model")
    assert ours.config is own


# -- the encoder of a masked autoencoder


@pytest.mark.parametrize("name", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_the_encoder_of_a_masked_autoencoder_is_a_vit(name, tmp_path):
    """Its encoder with nothing masked and its patches in their order, which the noise decides."""
    sizes = fields_of("ViT")
    config = transformers.ViTMAEConfig(
        **{key: sizes[key] for key in sizes if key not in ("num_labels", "encoder_stride")},
        decoder_hidden_size=16,
        decoder_intermediate_size=20,
        decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1,
        mask_ratio=0.0,
    )
    theirs: Any = randomize(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path)
    x = pixels()
    encoder = theirs if name == "ViTMAEModel" else theirs.vit
    noise = torch.arange(16.0).repeat(2, 1)
    with torch.no_grad():
        want = encoder(torch.tensor(x), noise=noise).last_hidden_state
    for auto, wanted, array in (
        (vit_flax.FlaxAutoModel, vit_flax.FlaxViTModel, np.asarray),
        (vit_torch.AutoModel, vit_torch.ViTModel, torch.tensor),
    ):
        model = auto.from_pretrained(tmp_path, add_pooling_layer=False)
        assert type(model) is wanted
        assert not hasattr(model.config, "mask_ratio")
        with torch.no_grad():
            got = first(model(array(x)))
        stage = difference(name, got, want)
        assert stage.max_abs <= BOUNDS["reference float32"], stage


# -- refusals


@pytest.mark.parametrize("auto", [auto for pair in AUTO.values() for auto in pair])
def test_refusals(auto, tmp_path):
    name = auto.__name__
    with pytest.raises(InputError, match=f"{name} is not a model itself; call {name}.from_pre"):
        auto()
    with pytest.raises(MissingFileError, match="no such"):
        auto.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="`config` must be a configuration; given a dict"):
        auto.from_config({})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin", "hidden_size": 8}))
    wanted = re.escape(str(tmp_path / "config.json")) + r".*`model_type` must be one of vit, .*swin"
    with pytest.raises(ConfigError, match=wanted):
        auto.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"`model_type` must be one of vit, .*'swin'"):
        auto.from_config(transformers.SwinConfig())


def test_refusals_of_configurations(tmp_path):
    with pytest.raises(ConfigError, match="AutoConfig is not a configuration itself"):
        AutoConfig()
    with pytest.raises(ConfigError, match=r"`model_type` must be one of vit, .*; given 'swin'"):
        AutoConfig.for_model("swin")
    with pytest.raises(ConfigError, match="given None"):
        AutoConfig.from_dict({"hidden_size": 8})
    with pytest.raises(ConfigError, match="expected a mapping"):
        AutoConfig.from_dict([])  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ConfigError, match=r"config\.json: .*given 'swin'"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["Beit", "Dinov2"])
def test_families_without_a_decoder(family, tmp_path):
    reference(family, f"{family}Model").save_pretrained(tmp_path)
    for auto in AUTO["ForMaskedImageModeling"]:
        match = f"{auto.__name__} has no class for the family '{family.lower()}'; wanted one of vit"
        with pytest.raises(ConfigError, match=match):
            auto.from_pretrained(tmp_path)


def test_public_names():
    """Every class an `Auto` class can choose is handed out by its package, with its base."""
    for package, prefix, index in ((vit_flax, "Flax", 0), (vit_torch, "", 1)):
        names = set(package.__all__)
        for kind, pair in AUTO.items():
            assert pair[index].__name__ == f"{prefix}AutoModel{kind.removeprefix('Model')}"
            assert pair[index].__name__ in names
            assert {cls.__name__ for cls in pair[index].classes.values()} <= names
        assert AUTO["ForImageClassification"][index].teacher.__name__ in names
        for family in FAMILIES:
            assert {f"{family}Config", f"{prefix}{family}PreTrainedModel"} <= names
            config_class = getattr(package, f"{prefix}{family}PreTrainedModel").config_class
            assert config_class is getattr(package, f"{family}Config")
        assert {"AutoConfig", "AutoImageProcessor", f"{prefix}BeitForMaskedImageModeling"} <= names


@pytest.fixture
def unregistered(monkeypatch):
    """What a test registers is gone afterwards."""
    for mapping in (families.CONFIG_CLASSES, families.CONFIG_MAPPING):
        for name in [*mapping]:  # so that each is put back
            monkeypatch.setitem(mapping, name, mapping[name])
    before = {id(m): dict(m) for m in (families.CONFIG_CLASSES, families.CONFIG_MAPPING)}
    for autos in AUTO.values():
        for auto in autos:
            monkeypatch.setattr(auto, "registered", {})
            if auto.mapping is not None:
                monkeypatch.setattr(auto, "mapping", dict(auto.mapping))
    yield
    for mapping in (families.CONFIG_CLASSES, families.CONFIG_MAPPING):
        for name in set(mapping) - set(before[id(mapping)]):
            del mapping[name]


@pytest.mark.parametrize("twin", [0, 1], ids=["flax", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_ones_own(unregistered, tmp_path, family, twin):
    """Registered as with Transformers 4.57.6, whose own family of that kind gives the outputs."""
    kind, flax = "ForImageClassification", twin == 0
    package = vit_flax if flax else vit_torch
    auto = AUTO[kind][twin]
    theirs = reference(family, family + kind).eval()
    base = getattr(package, ("Flax" if flax else "") + family + kind)
    config_base = getattr(vit_torch, f"{family}Config")

    class MineConfig(config_base):
        model_type = "mine"

        def __init__(self, extra=1, **kwargs):
            self.extra = extra
            super().__init__(**kwargs)

    class Mine(base):
        config_class = MineConfig

    AutoConfig.register("mine", MineConfig)
    auto.register(MineConfig, Mine)
    AutoConfig.register("mine", MineConfig)  # Transformers takes the same twice
    auto.register(MineConfig, Mine)
    config = AutoConfig.for_model("mine", extra=3, **fields_of(family))
    model = auto.from_config(config)
    assert type(model) is Mine
    theirs.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "model_type": "mine", "extra": 3}))
    model = auto.from_pretrained(tmp_path)
    assert type(model) is Mine
    assert type(model.config) is MineConfig
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "mine"
    again = auto.from_pretrained(tmp_path / "again")
    assert type(again) is Mine
    assert again.config.extra == 3
    x = pixels()
    with torch.no_grad():
        wanted = theirs(torch.tensor(x)).logits.numpy()
        got = first(again(x if flax else torch.tensor(x)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-4)
    if flax:
        assert auto.mapping[MineConfig] is Mine


def test_an_extended_network_of_a_family_of_ones_own(unregistered, tmp_path):
    class MineConfig(ViTConfig):
        model_type = "mine"

    class Mine(vit_torch.ViTModel):
        config_class = MineConfig

    AutoConfig.register("mine", MineConfig)
    vit_torch.AutoModel.register(MineConfig, Mine)
    Mine(MineConfig(**SMALL, num_register_tokens=2)).save_pretrained(tmp_path)
    again = vit_torch.AutoModel.from_pretrained(tmp_path)
    assert type(again) is Mine
    assert again.config.num_register_tokens == 2


def test_what_cannot_be_registered(unregistered):
    """Refused here and by Transformers 4.57.6; the built-in ones only with `exist_ok`."""

    class MineConfig(ViTConfig):
        model_type = "mine"

    class TheirsConfig(transformers.ViTConfig):
        model_type = "mine"

    class Mine(vit_torch.ViTModel):
        pass

    for register, config in (
        (transformers.AutoConfig.register, TheirsConfig),
        (AutoConfig.register, MineConfig),
    ):
        with pytest.raises(ValueError, match="model_type"):
            register("other", config)
    with pytest.raises(ValueError, match="already used"):
        transformers.AutoConfig.register("vit", transformers.ViTConfig)
    with pytest.raises(ConfigError, match="'vit' is built in; use another"):
        AutoConfig.register("vit", ViTConfig)
    with pytest.raises(ConfigError, match="`config` must be a subclass of ViTConfig"):
        AutoConfig.register("mine", TheirsConfig)
    with pytest.raises(ValueError, match="not consistent"):
        transformers.AutoModel.register(TheirsConfig, transformers.ViTModel)
    with pytest.raises(InputError, match="must be that of ViTModel, ViTConfig; given MineConfig"):
        vit_torch.AutoModel.register(MineConfig, vit_torch.ViTModel)
    with pytest.raises(ValueError, match="already used"):
        transformers.AutoModel.register(transformers.ViTConfig, transformers.ViTModel)
    with pytest.raises(InputError, match="has a class for ViTConfig already"):
        vit_torch.AutoModel.register(ViTConfig, Mine)
    with pytest.raises(InputError, match="`model_class` must be a subclass"):
        vit_torch.AutoModel.register(MineConfig, dict)
    with pytest.raises(InputError, match="`config_class` must be a subclass"):
        vit_torch.AutoModel.register(TheirsConfig, Mine)
    vit_torch.AutoModel.register(ViTConfig, Mine, exist_ok=True)
    assert type(vit_torch.AutoModel.from_config(ViTConfig(**SMALL))) is Mine
    # Transformers' models take a subclass of their configuration, too.
    assert type(vit_torch.ViTModel(MineConfig(**SMALL)).config) is MineConfig
    transformers.ViTModel(TheirsConfig(**SMALL))
    with pytest.raises(ConfigError, match="no class for the family 'mine'; wanted one of vit, "):
        vit_torch.AutoModel.from_config(MineConfig(**SMALL))
