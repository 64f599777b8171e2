"""What scripts for Transformers' Flax models do beyond calling them: trees of old models, inner
modules, modules of one's own, mappings from configurations, a training script's steps."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax.core import freeze, unfreeze
from flax.training import train_state
from flax.training.common_utils import onehot
from flax.traverse_util import flatten_dict, unflatten_dict

import vit_flax
import vit_torch
from vit_common.errors import InputError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
VIT = {**SIZES, "intermediate_size": 32}
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
TREES = {
    "dinov2": ("FlaxDinov2ForImageClassification", "Dinov2Config", SIZES),
    "dinov2 gated": ("FlaxDinov2Model", "Dinov2Config", {**SIZES, "use_swiglu_ffn": True}),
    "beit tokens": (
        "FlaxBeitForMaskedImageModeling",
        "BeitConfig",
        {**VIT, "vocab_size": 11, "use_mask_token": True},
    ),
    "beit": ("FlaxBeitModel", "BeitConfig", {**VIT, "use_relative_position_bias": True}),
    "vit": ("FlaxViTForImageClassification", "ViTConfig", VIT),
}


def plain(tree):
    """A nested dict of plain dicts with something in every parameter."""
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: np.asarray(p) + draw.normal(0, 0.1, p.shape).astype(np.float32), unfreeze(tree)
    )


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case if case in ("vit", "beit") else pytest.param(case, marks=pytest.mark.slow)
        for case in TREES
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_trees_of_transformers(case):
    """Their parameters as `params=`, also traced, and there and back."""
    name, config, fields = TREES[case]
    theirs = getattr(transformers, name)(getattr(transformers, config)(**fields))
    ours = getattr(vit_flax, name)(getattr(vit_flax, config)(**fields))
    params = plain(theirs.params)
    masks = (np.ones((2, 4), int),) if "Masked" in name else ()
    want = theirs(IMAGES, *masks, params=params)[0]
    np.testing.assert_allclose(ours(IMAGES, *masks, params=params)[0], want, atol=5e-6)
    gradient = jax.grad(lambda p: ours(IMAGES, *masks, params=p)[0].sum())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    ours.params = params
    assert_equal(vit_flax.to_transformers_tree(ours.params, ours.config), params)
    assert_equal(vit_flax.from_transformers_tree(params, ours.config), ours.params)
    assert_equal(vit_flax.from_transformers_tree(ours.params, ours.config), ours.params)


def test_trees_of_other_models_are_refused():
    config = vit_flax.Dinov2Config(**SIZES)
    with pytest.raises(InputError, match="dinov2 model; no such model has wte/embedding"):
        vit_flax.from_transformers_tree({"wte": {"embedding": np.zeros(3)}}, config)


@pytest.mark.parametrize("case", ["vit", "dinov2"])
def test_inner_modules_by_their_names(case):
    name, config, fields = TREES[case]
    ours = getattr(vit_flax, name)(getattr(vit_flax, config)(**fields))
    prefix = ours.base_model_prefix

    def run(method):
        pixels = IMAGES.transpose(0, 2, 3, 1)
        return ours.module.apply({"params": ours.params}, pixels, method=method)

    want = ours(IMAGES, output_hidden_states=True).hidden_states
    got = run(lambda m, x: getattr(m, prefix).embeddings(x))
    np.testing.assert_allclose(got, want[0], atol=1e-6)
    got = run(lambda m, x: getattr(m, prefix).encoder(getattr(m, prefix).embeddings(x)))
    np.testing.assert_allclose(got.last_hidden_state, want[-1], atol=1e-6)
    got = run(lambda m, x: getattr(m, prefix).encoder.layer.layers[0](want[0])[0])
    np.testing.assert_allclose(got, want[1], atol=1e-6)


class Pooled(nn.Module):
    """As people write heads of their own for Transformers' Flax models."""

    config: vit_flax.ViTConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vit = vit_flax.FlaxViTModule(self.config, dtype=self.dtype, add_pooling_layer=False)
        self.norm = nn.LayerNorm()
        self.fc = nn.Dense(5)

    def __call__(
        self,
        pixel_values,
        deterministic=True,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        outputs = self.vit(
            pixel_values,
            deterministic=deterministic,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.fc(self.norm(outputs.last_hidden_state.mean(1)))
        if not return_dict:
            return (logits,)
        return vit_flax.FlaxSequenceClassifierOutput(
            logits=logits, hidden_states=outputs.hidden_states
        )


class PooledModel(vit_flax.FlaxViTPreTrainedModel):
    module_class = Pooled


@pytest.mark.slow
def test_a_module_of_ones_own(tmp_path):
    base = vit_flax.FlaxViTModel(vit_flax.ViTConfig(**VIT), seed=3)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="newly initialized.* fc.bias, fc.kernel, norm"):
        model = PooledModel.from_pretrained(tmp_path / "base")
    hidden = base(IMAGES).last_hidden_state
    head = {name: model.params[name] for name in ("norm", "fc")}
    want = nn.Dense(5).apply(
        {"params": head["fc"]}, nn.LayerNorm().apply({"params": head["norm"]}, hidden.mean(1))
    )
    np.testing.assert_allclose(model(IMAGES).logits, want, atol=1e-5)
    assert len(model(IMAGES, output_hidden_states=True).hidden_states) == 3
    assert model(IMAGES, return_dict=False)[0].shape == (2, 5)
    model.save_pretrained(tmp_path / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, params = PooledModel.from_pretrained(tmp_path / "mine", _do_init=False)
    assert_equal(params, model.params)
    np.testing.assert_array_equal(again(IMAGES, params=params).logits, model(IMAGES).logits)
    drawn = PooledModel(vit_flax.ViTConfig(**VIT), dtype=jnp.bfloat16, seed=1)
    assert jax.tree.structure(drawn.init_weights(jax.random.key(0), (1, 8, 8, 3))) == (
        jax.tree.structure(params)
    )
    assert drawn.num_parameters() == sum(p.size for p in jax.tree.leaves(params))


class OwnModel(vit_flax.FlaxPreTrainedModel):
    """As people write a class for Transformers' base class: it builds and draws its module."""

    config_class = vit_flax.ViTConfig
    base_model_prefix = "vit"
    module_class = Pooled

    def __init__(
        self, config, input_shape=None, seed=0, dtype=jnp.float32, _do_init=True, **kwargs
    ):
        module = self.module_class(config=config, dtype=dtype, **kwargs)
        super().__init__(config, module, input_shape, seed=seed, dtype=dtype, _do_init=_do_init)

    def init_weights(self, rng, input_shape, params=None):
        drawn = self.module.init(rng, jnp.zeros(input_shape, self.dtype))["params"]
        if params is None:
            return freeze(drawn)
        drawn, params = flatten_dict(unfreeze(drawn)), flatten_dict(unfreeze(params))
        params |= {path: drawn[path] for path in self._missing_keys}
        self._missing_keys = set()
        return freeze(unflatten_dict(params))

    def __call__(self, pixel_values, params=None, train=False):
        params = params or self.params
        images = jnp.transpose(pixel_values, (0, 2, 3, 1))
        return self.module.apply({"params": params}, images, not train)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*newly initialized", "ignore:.*deprecated")
def test_a_class_that_builds_its_module(tmp_path):
    base = transformers.FlaxViTModel(transformers.ViTConfig(**VIT), seed=3)
    base.save_pretrained(tmp_path / "base")
    model = OwnModel.from_pretrained(tmp_path / "base")
    without_pooler = {name: part for name, part in base.params.items() if name != "pooler"}
    assert_equal(model.params["vit"], without_pooler)
    want = base(IMAGES).last_hidden_state.mean(1)
    want = nn.LayerNorm().apply({"params": model.params["norm"]}, want)
    want = nn.Dense(5).apply({"params": model.params["fc"]}, want)
    np.testing.assert_allclose(model(IMAGES), want, atol=1e-5)
    model.save_pretrained(tmp_path / "mine")
    again, params = OwnModel.from_pretrained(tmp_path / "mine", _do_init=False)
    assert_equal(params, model.params)
    np.testing.assert_array_equal(again(IMAGES, params=params), model(IMAGES))
    with pytest.raises(InputError, match=r"`module` must be a linen module.*given a type"):
        vit_flax.FlaxPreTrainedModel(vit_flax.ViTConfig(**VIT), Pooled)


class Rebuilt(vit_flax.FlaxViTPreTrainedModel):
    """A class as Transformers writes its own: the module alone says that there is a head."""

    module_class = vit_flax.FlaxViTForImageClassificationModule


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_class_named_by_its_module_alone(tmp_path):
    theirs = transformers.FlaxViTForImageClassification(transformers.ViTConfig(**VIT), seed=1)
    theirs.save_pretrained(tmp_path)
    model = Rebuilt.from_pretrained(tmp_path)
    assert_equal(model.params, unfreeze(theirs.params))
    np.testing.assert_allclose(model(IMAGES).logits, theirs(IMAGES).logits, atol=1e-5)


class Network(nn.Module):
    """A network put together anew from its parts, as scripts do to change one of them."""

    config: vit_flax.ViTConfig
    parts: object

    def setup(self):
        self.embeddings = self.parts.FlaxViTEmbeddings(self.config, dtype=jnp.float32)
        self.encoder = self.parts.FlaxViTEncoder(self.config, dtype=jnp.float32)
        self.layernorm = nn.LayerNorm(epsilon=self.config.layer_norm_eps)
        self.pooler = self.parts.FlaxViTPooler(self.config, dtype=jnp.float32)

    def __call__(self, images, return_dict):
        outputs = self.encoder(
            self.embeddings(images, deterministic=True),
            deterministic=True,
            output_attentions=True,
            output_hidden_states=True,
            return_dict=return_dict,
        )
        last = self.layernorm(outputs[0])
        return last, self.pooler(last), *outputs[1:]


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_network_of_parts(return_dict):
    theirs = transformers.FlaxViTModel(transformers.ViTConfig(**VIT), seed=1)
    images = IMAGES.transpose(0, 2, 3, 1)
    variables = {"params": theirs.params}
    network = Network(transformers.ViTConfig(**VIT), transformers.models.vit.modeling_flax_vit)
    want = network.apply(variables, images, True)  # without it they drop the hidden states
    network = Network(vit_flax.ViTConfig(**VIT), vit_flax)
    got = network.apply(variables, images, return_dict)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_mappings_and_small_methods():
    mapping = vit_flax.FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    theirs = transformers.FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    shared = {config.model_type for config in theirs} & {config.model_type for config in mapping}
    assert shared == {"vit", "beit", "dinov2"}
    names = {config.model_type: model.__name__ for config, model in mapping.items()}
    for config, model in theirs.items():
        if config.model_type in shared:
            assert names[config.model_type] == model.__name__
    assert vit_flax.FLAX_MODEL_MAPPING[vit_flax.CONFIG_MAPPING["vit"]] is vit_flax.FlaxViTModel
    config = vit_flax.ViTConfig(**VIT)
    model = vit_flax.FlaxAutoModelForImageClassification.from_config(
        config, seed=2, dtype=jnp.float32
    )
    assert isinstance(model, vit_flax.FlaxPreTrainedModel)
    assert isinstance(model.module, vit_flax.FlaxViTForImageClassificationModule)
    assert not model.can_generate()
    assert model.num_parameters() * 4 == model.get_memory_footprint()
    model.add_model_tags("mine")
    model.add_model_tags(["mine", "other"])
    assert model.model_tags == ["mine", "other"]
    beit = vit_flax.FlaxBeitModel(vit_flax.BeitConfig(**VIT))
    assert isinstance(beit.module, vit_flax.FlaxBeitModule)
    assert isinstance(beit(IMAGES), vit_flax.FlaxBeitModelOutputWithPooling)


def test_attributes_of_flax_models_as_in_transformers():
    class Ours(vit_flax.FlaxViTModel):
        pass

    class Theirs(transformers.FlaxViTModel):
        pass

    ours = Ours(vit_flax.ViTConfig(**VIT, name_or_path="somewhere"), _do_init=False)
    theirs = Theirs(transformers.ViTConfig(**VIT, name_or_path="somewhere"), _do_init=False)
    assert ours.generation_config is theirs.generation_config is None
    assert ours.name_or_path == theirs.config.name_or_path == "somewhere"
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), m._params_shape_tree) for m in (ours, theirs)
    ]
    assert shapes[0] == unfreeze(shapes[1])
    for model in (ours, theirs):
        assert model._auto_class is None
        model.register_for_auto_class()
        assert type(model)._auto_class == "FlaxAutoModel"
        with pytest.raises(ValueError, match=r"(?i)auto.class"):
            model.register_for_auto_class("Model")
    assert vit_flax.FlaxViTModel._auto_class is None


class TrainState(train_state.TrainState):
    dropout_rng: jax.Array


def test_the_steps_of_a_training_script(tmp_path):
    """A `TrainState` over `model.__call__`, a pmapped step, a save and a load."""
    config = vit_flax.CONFIG_MAPPING["vit"](**VIT, num_labels=3)
    model = vit_flax.FlaxAutoModelForImageClassification.from_config(config, seed=0)
    state = TrainState.create(
        apply_fn=model.__call__,
        params=model.params,
        tx=optax.adamw(1e-2),
        dropout_rng=jax.random.PRNGKey(0),
    )
    batch = {"pixel_values": IMAGES, "labels": np.array([0, 2])}

    def step(state, batch):
        rng, new_rng = jax.random.split(state.dropout_rng)

        def compute_loss(params):
            labels = batch["labels"]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = state.apply_fn(**inputs, params=params, dropout_rng=rng, train=True)[0]
            return optax.softmax_cross_entropy(logits, onehot(labels, logits.shape[-1])).mean()

        loss, gradient = jax.value_and_grad(compute_loss)(state.params)
        return state.apply_gradients(grads=gradient, dropout_rng=new_rng), loss

    jitted = jax.jit(step)
    losses = []
    for _ in range(5):
        state, loss = jitted(state, batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path, params=state.params)
    again = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
        tmp_path, config=config, seed=0, dtype=jnp.float32, use_auth_token=None
    )
    assert_equal(again.params, state.params)


@pytest.mark.parametrize("size", [(11, 9), (8, 15)])
def test_images_cut_to_whole_patches(size, tmp_path):
    """As Transformers' DINOv2 does without being told, in both twins."""
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).eval()
    images = np.random.default_rng(2).standard_normal((2, 3, *size)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(images)).last_hidden_state
    theirs.save_pretrained(tmp_path)
    twin = vit_torch.Dinov2Model.from_pretrained(tmp_path)
    with torch.no_grad():
        got = twin(torch.tensor(images), interpolate_pos_encoding="crop").last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    ours = vit_flax.FlaxDinov2Model.from_pretrained(tmp_path, precision="highest")
    got = ours(images, interpolate_pos_encoding="crop").last_hidden_state
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match=r"=.crop.` to leave out the last rows"):
        ours(images)
    with pytest.raises(InputError, match="True, False, None or 'crop'; given 'cut'"):
        ours(images, interpolate_pos_encoding="cut")
