"""The PyTorch twins beside the models of Transformers 4.57.6: arguments, parameters, outputs.

Numbers are compared in test_parity.py, files in test_pretrained.py.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from networks import images, make_config, random_weights, reference_config, torch_twin
from safetensors.numpy import save_file
from torch.utils import _pytree

import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError

CLASSES = {
    None: vit_torch.ViTModel,
    "classifier": vit_torch.ViTForImageClassification,
    "decoder": vit_torch.ViTForMaskedImageModeling,
}
B, S, D, A, L = 2, 17, 48, 4, 2
ALL = {"output_hidden_states": True, "output_attentions": True}


def config_of(**overrides) -> ViTConfig:
    return make_config(num_hidden_layers=L, **overrides)


def made(head=None, config: ViTConfig | None = None, dtype=torch.float32, **kwargs):
    config = config or config_of()
    return torch_twin(CLASSES[head], config, random_weights(config, head), dtype, **kwargs)


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def classifier():
    return made("classifier")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.tensor(images(config_of()), dtype=torch.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_same(got, want, atol: float = 0.0) -> None:
    got, want = (_pytree.tree_leaves(value) for value in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -- signatures


def names(function) -> list[str]:
    return list(inspect.signature(function).parameters)


FORWARD = ["output_attentions", "output_hidden_states", "interpolate_pos_encoding", "return_dict"]


@pytest.mark.parametrize(
    ("head", "inputs"),
    [
        (None, ["pixel_values", "bool_masked_pos", "head_mask"]),
        ("classifier", ["pixel_values", "head_mask", "labels"]),
        ("decoder", ["pixel_values", "bool_masked_pos", "head_mask"]),
    ],
)
def test_forward_takes_what_transformers_takes(head, inputs):
    forward = inspect.signature(CLASSES[head].forward).parameters
    assert list(forward) == ["self", *inputs, *FORWARD]
    assert all(p.default is None for n, p in forward.items() if n not in ("self", "pixel_values"))
    theirs = names(getattr(transformers, CLASSES[head].__name__).forward)
    assert theirs[: 1 + len(inputs)] == ["self", *inputs]
    assert set(theirs) - {"kwargs"} <= set(forward)


def test_constructors_take_what_those_of_transformers_take():
    for cls in CLASSES.values():
        theirs = names(getattr(transformers, cls.__name__).__init__)
        assert names(cls.__init__) == [*theirs, "attn_implementation"]
        last = inspect.signature(cls.__init__).parameters["attn_implementation"]
        assert last.kind is last.KEYWORD_ONLY
    built = vit_torch.ViTModel(config_of(), False, True)
    assert built.pooler is None
    assert built.embeddings.mask_token.shape == (1, 1, D)


@pytest.mark.parametrize("name", ["save_pretrained", "from_pretrained"])
def test_files_take_what_transformers_takes(name):
    theirs = inspect.signature(getattr(transformers.ViTModel, name)).parameters
    ours = inspect.signature(getattr(vit_torch.ViTModel, name)).parameters
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if "save_peft_format" in positional:  # the last, for adapters, which are not here
        positional.remove("save_peft_format")
    assert list(ours)[: len(positional)] == positional
    for parameter in ("max_shard_size", "safe_serialization", "push_to_hub", "state_dict"):
        if parameter in theirs:
            assert ours[parameter].default == theirs[parameter].default


# -- parameters

OPTIONS = [
    (None, {}, {}),
    (None, {}, {"add_pooling_layer": False}),
    (None, {}, {"use_mask_token": True}),
    (None, {"qkv_bias": False, "pooler_output_size": 20, "num_channels": 1}, {}),
    (None, {"num_hidden_layers": 0}, {}),
    ("classifier", {"num_labels": 7, "intermediate_size": 20}, {}),
    ("decoder", {}, {}),
    ("decoder", {"encoder_stride": 4, "num_channels": 4}, {}),
]


@pytest.mark.parametrize(("head", "fields", "kwargs"), OPTIONS)
def test_state_dict_is_that_of_transformers(head, fields, kwargs):
    config = make_config(**{"num_hidden_layers": 1, **fields})
    ours = CLASSES[head](config, **kwargs)
    theirs = getattr(transformers, CLASSES[head].__name__)(reference_config(config), **kwargs)
    assert [(name, value.shape, value.dtype) for name, value in ours.state_dict().items()] == [
        (name, value.shape, value.dtype) for name, value in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert ours.num_parameters() == theirs.num_parameters()


def test_number_of_parameters_of_vit_base():
    with torch.device("meta"):
        built = vit_torch.ViTForImageClassification(ViTConfig(num_labels=1000))
    assert built.num_parameters() == 86_567_656
    built.vit.requires_grad_(False)
    assert built.num_parameters(only_trainable=True) == 769_000


def test_new_weights_are_drawn_as_transformers_draws_them():
    config = config_of(initializer_range=0.03)
    for head, cls in CLASSES.items():
        ours, theirs = (
            c.state_dict()
            for c in (
                cls(config),
                getattr(transformers, cls.__name__)(reference_config(config)),
            )
        )
        drawn = []
        for name, value in ours.items():
            if theirs[name].std() == 0 or value.numel() == 1:
                assert torch.equal(value, theirs[name]), (head, name)
            else:
                drawn.append(value.flatten().numpy())
                assert abs(drawn[-1].std() / 0.03 - 1) < 5 / np.sqrt(2 * value.numel()), name
        normal = scipy.stats.norm(0, 0.03).cdf
        assert scipy.stats.kstest(np.concatenate(drawn), normal).pvalue > 1e-3
    again = vit_torch.ViTModel(config_of(initializer_range=0.0))
    assert not again.embeddings.cls_token.any()


def test_a_seed_decides_the_weights():
    def build():
        torch.manual_seed(3)
        return vit_torch.ViTModel(config_of()).state_dict()

    assert_same(build(), build())


# -- outputs


@pytest.fixture(scope="module")
def output(model, x):
    with torch.no_grad():
        return model(x, **ALL)


def test_shapes_of_the_output(output):
    assert type(output) is vit_torch.BaseModelOutputWithPooling
    assert output.last_hidden_state.shape == (B, S, D)
    assert output.pooler_output.shape == (B, D)
    assert [h.shape for h in output.hidden_states] == [(B, S, D)] * (L + 1)
    assert [a.shape for a in output.attentions] == [(B, A, S, S)] * L
    assert isinstance(output.hidden_states, tuple)
    assert isinstance(output.attentions, tuple)
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(B, A, S), rtol=0, atol=1e-6)


def test_outputs_read_as_those_of_transformers(output):
    fields = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
    theirs = transformers.modeling_outputs.BaseModelOutputWithPooling(
        **{name: getattr(output, name) for name in fields if name != "pooler_output"}
    )
    ours = output.replace(pooler_output=None)
    assert list(ours.keys()) == list(theirs.keys()) == list(ours)
    assert len(ours) == len(theirs)
    for name in theirs:
        assert ours[name] is theirs[name] is getattr(ours, name)
    for index in range(len(theirs)):
        assert ours[index] is theirs[index]
    assert all(a is b for a, b in zip(ours[1:], theirs[1:], strict=True))
    assert all(a is b for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True))
    assert dict(**ours).keys() == dict(**theirs).keys()
    for one in (ours, theirs):
        with pytest.raises(KeyError, match="pooler_output"):
            one["pooler_output"]


def test_outputs_are_pytrees_and_pickle(output):
    doubled = _pytree.tree_map(lambda value: 2 * value, output)
    assert type(doubled) is type(output)
    assert torch.equal(doubled.attentions[1], 2 * output.attentions[1])
    without = output.replace(pooler_output=None)
    assert _pytree.tree_map(lambda v: v, without).keys() == without.keys()
    # As Transformers' outputs, whose leaves are what is set.
    theirs = transformers.modeling_outputs.BaseModelOutputWithPooling(**without)
    leaves = _pytree.tree_leaves(theirs)
    assert all(a is b for a, b in zip(_pytree.tree_leaves(without), leaves, strict=True))
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is type(output)
    assert_same(again, output)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_a_model(x):
    """Whose outputs torch refuses where one of their leaves is None."""
    model = made(None)
    with torch.no_grad():
        mapped = torch.func.vmap(model)(x[:, None])
        want = torch.stack([model(image[None]).last_hidden_state for image in x])
    torch.testing.assert_close(mapped.last_hidden_state, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("head", CLASSES)
def test_tuples_hold_every_requested_field_in_order(x, head):
    built = made(head)
    call = {
        None: {},
        "classifier": {"labels": torch.tensor([1, 2])},
        "decoder": {"bool_masked_pos": torch.ones(B, S - 1, dtype=torch.bool)},
    }[head]
    first = {
        None: ["last_hidden_state", "pooler_output"],
        "classifier": ["loss", "logits"],
        "decoder": ["loss", "reconstruction"],
    }[head]
    for hidden, attentions in itertools.product((False, True), repeat=2):
        flags = {"output_hidden_states": hidden, "output_attentions": attentions}
        named = built(x, **call, **flags)
        want = first + ["hidden_states"] * hidden + ["attentions"] * attentions
        assert list(named.keys()) == want
        plain = built(x, **call, **flags, return_dict=False)
        assert type(plain) is tuple
        assert_same(plain, named.to_tuple())
    assert list(built(x).keys()) == [name for name in first if name != "loss"]


def test_flags_that_are_none_come_from_the_config(x):
    built = made(config=config_of(output_attentions=True))
    assert list(built(x).keys())[-1] == "attentions"
    built.config.output_hidden_states = True
    assert len(built(x)) == 4
    built.config.return_dict = False
    assert isinstance(built(x), tuple)
    assert len(built(x, None, None, False, False, None, True)) == 2


def test_classes_of_the_outputs(classifier, x):
    assert type(classifier(x)) is vit_torch.ImageClassifierOutput
    assert type(made("decoder")(x)) is vit_torch.MaskedImageModelingOutput


# -- kernels


def test_attentions_come_whichever_kernel_is_set(x):
    eager, sdpa, auto = (made(attn_implementation=name) for name in ("eager", "sdpa", "auto"))
    with torch.no_grad():
        want = eager(x, **ALL)
        for built in (sdpa, auto):
            assert_same(built(x, **ALL), want)  # the layers asked for run eagerly
            assert_same(built(x), eager(x), atol=2e-6)


def test_sdpa_is_used_where_it_can_be(x, monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counting(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    for kernel, times in (("eager", 0), ("sdpa", L), ("auto", L)):
        calls.clear()
        made(attn_implementation=kernel)(x)
        assert len(calls) == times
        calls.clear()
        made(attn_implementation=kernel)(x, output_attentions=True)
        made(attn_implementation=kernel)(x, head_mask=torch.ones(A))
        assert not calls


@pytest.mark.parametrize("shape", [(A,), (L, A)])
def test_a_head_mask_works_with_every_kernel(x, shape):
    """It is a silent no-op in Transformers under sdpa; its eager kernel is the reference."""
    mask = torch.tensor(np.random.default_rng(0).random(shape), dtype=torch.float32)
    reference = transformers.ViTModel(reference_config(config_of(), "eager")).eval()
    reference.load_state_dict(made().state_dict())
    with torch.no_grad():
        want = reference(x, head_mask=mask).last_hidden_state
        plain = reference(x).last_hidden_state
        for kernel in ("eager", "sdpa", "auto"):
            got = made(attn_implementation=kernel)(x, head_mask=mask).last_hidden_state
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
            assert not torch.allclose(got, plain, atol=1e-2)
            none = made(attn_implementation=kernel)(x, head_mask=0 * mask)
            deaf = made(attn_implementation=kernel)(x * 0, head_mask=0 * mask)
            # With every head off the class token sees no patch.
            assert_same(none.pooler_output, deaf.pooler_output)


def test_choosing_the_kernel_later(x):
    built = made(attn_implementation="eager")
    built.set_attn_implementation("sdpa")
    assert {
        m.attn_implementation for m in built.modules() if hasattr(m, "attn_implementation")
    } == {"sdpa"}
    with pytest.raises(InputError, match="must be one of 'auto', 'eager', 'sdpa'; given 'flash'"):
        built.set_attn_implementation("flash")
    with pytest.raises(InputError, match="`attn_implementation` must be one of"):
        vit_torch.ViTModel(config_of(), attn_implementation=None)


# -- training


def assert_element_wise(kept: torch.Tensor, rate: float) -> None:
    """Dropped at `rate`, and alone: no axis shares a mask with another."""
    kept = kept.numpy()
    assert abs(1 - kept.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    for axis in range(kept.ndim):
        a, b = np.moveaxis(kept, axis, 0)[:2].astype(float)
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.size), axis


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_dropout_is_element_wise_at_its_rate(kernel):
    config = config_of(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    built = made(config=config, attn_implementation=kernel)
    x = torch.tensor(images(config, 8), dtype=torch.float32)
    with torch.no_grad():
        plain = built(x, **ALL)
        assert_same(built(x, **ALL), plain)
        noisy = built.train()(x, **ALL)
        assert not torch.equal(built(x).pooler_output, noisy.pooler_output)
        torch.manual_seed(3)
        first = built(x).pooler_output
        torch.manual_seed(3)
        assert torch.equal(built(x).pooler_output, first)
    before, after = plain.hidden_states[0], noisy.hidden_states[0]
    kept = after != 0
    torch.testing.assert_close(after[kept], before[kept] / 0.75)
    assert_element_wise(kept, 0.25)
    for probabilities in noisy.attentions:
        assert_element_wise(probabilities != 0, 0.5)


def test_modes_are_those_of_transformers(tmp_path):
    assert vit_torch.ViTModel(config_of()).training
    made().train().save_pretrained(tmp_path)
    for cls in (vit_torch.ViTModel, transformers.ViTModel):
        loaded = cls.from_pretrained(tmp_path)
        assert not loaded.training
        assert not any(module.training for module in loaded.modules())
        assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("how", ["method", "config", "transformers' method"])
def test_gradient_checkpointing_changes_the_memory_and_nothing_else(x, how):
    fields = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.5}
    runs = []

    def measure(built):
        built.train().zero_grad()
        torch.manual_seed(1)
        calls = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
            for layer in built.base_model.encoder.layer
        ]
        result = built(x, labels=torch.tensor([1, 2]), **ALL)
        result.loss.backward()
        for hook in hooks:
            hook.remove()
        return result, {n: p.grad.clone() for n, p in built.named_parameters()}, len(calls)

    plain = made("classifier", config_of(**fields))
    runs.append(measure(plain))
    if how == "config":
        checkpointed = made("classifier", config_of(**fields, gradient_checkpointing=True))
    else:
        checkpointed = made("classifier", config_of(**fields))
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        checkpointed.gradient_checkpointing_enable(**(kwargs if "'" in how else {}))
        assert not checkpointed.config.gradient_checkpointing
    assert checkpointed.is_gradient_checkpointing
    runs.append(measure(checkpointed))
    checkpointed.gradient_checkpointing_disable()
    assert not checkpointed.is_gradient_checkpointing
    runs.append(measure(checkpointed))
    assert [calls for *_, calls in runs] == [L, 2 * L, L]
    for result, gradients, _ in runs[1:]:
        assert_same(result, runs[0][0])
        assert_same(gradients, runs[0][1])
    with torch.no_grad():
        checkpointed.gradient_checkpointing_enable()
        assert_same(checkpointed.eval()(x), plain.eval()(x))


def test_labels_that_fit(classifier, x):
    def loss(labels):
        return classifier(x, labels=labels).loss

    want = loss(torch.tensor([1, 4]))
    for dtype in (torch.int32, torch.uint8, torch.int8):
        assert torch.equal(loss(torch.tensor([1, 4], dtype=dtype)), want)
    assert torch.equal(loss(torch.tensor([[1], [4]])), want)
    several = torch.arange(10).reshape(2, 5) % 2
    want = loss(several.float())
    for dtype in (torch.bool, torch.bfloat16, torch.float64):
        torch.testing.assert_close(loss(several.to(dtype)), want)


# -- dtypes, devices, copies


def test_dtype_and_device(x):
    built = made()
    assert (built.dtype, built.device, built.framework) == (
        torch.float32,
        torch.device("cpu"),
        "pt",
    )
    half = copy.deepcopy(built).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(x).last_hidden_state.dtype == torch.bfloat16  # images are cast
    assert built.double()(x).pooler_output.dtype == torch.float64
    assert built.to("meta").device.type == "meta"


def test_models_are_built_and_loaded_on_the_default_device(tmp_path):
    made().save_pretrained(tmp_path)
    with torch.device("meta"):
        for built in (
            vit_torch.ViTModel(config_of()),
            vit_torch.ViTModel.from_pretrained(tmp_path),
            vit_torch.ViTModel.from_pretrained(tmp_path, dtype="bfloat16"),
        ):
            assert {p.device.type for p in built.parameters()} == {"meta"}
        with pytest.warns(UserWarning, match="newly initialized"):
            built = vit_torch.ViTForImageClassification.from_pretrained(tmp_path)
        assert {p.device.type for p in built.parameters()} == {"meta"}
    assert vit_torch.ViTModel.from_pretrained(tmp_path).device.type == "cpu"


@pytest.mark.parametrize("head", CLASSES)
def test_copies_and_pickles(x, head):
    built = made(head)
    want = built(x)
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert type(twin) is type(built)
        assert twin.config == built.config
        assert_same(twin(x), want)
        for p in twin.parameters():
            p.data.zero_()
        twin.config.output_attentions = True
    assert_same(built(x), want)


def test_what_the_models_say_of_themselves(model, classifier):
    assert model.config_class is ViTConfig
    assert (model.base_model_prefix, model.main_input_name) == ("vit", "pixel_values")
    assert model.base_model is model
    assert classifier.base_model is classifier.vit
    assert classifier.num_labels == 5
    assert model.get_input_embeddings() is model.embeddings.patch_embeddings
    assert classifier.get_input_embeddings() is classifier.vit.embeddings.patch_embeddings
    assert isinstance(model, vit_torch.ViTPreTrainedModel)
    config = config_of()
    assert vit_torch.ViTModel(config).config is config
    assert not model.is_gradient_checkpointing


# -- what does not fit

IMAGES = torch.zeros(2, 3, 32, 32)
WRONG_CALLS = {
    "no images": (None, {"pixel_values": None}, r"`pixel_values` must have 4 dimensions"),
    "numpy": (
        None,
        {"pixel_values": np.zeros((2, 3, 32, 32))},
        "`pixel_values` must be a torch tensor; given a ndarray",
    ),
    "a list": (None, {"pixel_values": [1]}, "`pixel_values` must be a torch tensor; given a list"),
    "one image": (
        None,
        {"pixel_values": IMAGES[0]},
        r"4 dimensions, \(batch, channels, height, width\).*`pixel_values\[None\]`",
    ),
    "channels": (
        None,
        {"pixel_values": torch.zeros(2, 4, 32, 32)},
        "`pixel_values` must have 3 channels; given 4",
    ),
    "channels last": (
        None,
        {"pixel_values": IMAGES.permute(0, 2, 3, 1)},
        r"must have 3 channels; given 32\. Channels seem to be last",
    ),
    "size": (
        None,
        {"pixel_values": torch.zeros(2, 3, 16, 64)},
        r"must be 32 x 32 pixels \(height x width\); given 16 x 64",
    ),
    "no whole patches": (
        None,
        {"pixel_values": torch.zeros(2, 3, 39, 39), "interpolate_pos_encoding": True},
        r"whole patches of 8 x 8 pixels \(height x width\); given 39 x 39",
    ),
    "head mask": (
        None,
        {"head_mask": torch.ones(3)},
        r"`head_mask` must have shape \(heads,\) = \(4,\).* = \(2, 4\); given \(3,\)",
    ),
    "head mask of a list": (None, {"head_mask": [1, 1]}, "`head_mask` must be a torch tensor"),
    "mask without token": (
        None,
        {"bool_masked_pos": torch.ones(2, 16)},
        "`bool_masked_pos` needs a mask token.*`use_mask_token=True`",
    ),
    "mask of other shape": (
        "decoder",
        {"bool_masked_pos": torch.ones(2, 4, 4)},
        r"\(batch, patches\) = \(2, 16\); given \(2, 4, 4\)",
    ),
    "mask of numpy": (
        "decoder",
        {"bool_masked_pos": np.ones((2, 16))},
        "`bool_masked_pos` must be a torch tensor",
    ),
    "label too large": (
        "classifier",
        {"labels": torch.tensor([0, 5])},
        r"`labels` must be from 0 to 4 \(or -100 .*\); given 5",
    ),
    "label too small": ("classifier", {"labels": torch.tensor([-1, 0])}, "0 to 4 .* given -1"),
    "too few labels": (
        "classifier",
        {"labels": torch.tensor([0])},
        r"one class index per image, shape \(2,\); given \(1,\)",
    ),
    "labels of several": (
        "classifier",
        {"labels": torch.ones(2, 4)},
        r"\(batch, classes\) = \(2, 5\) for multi_label_classification; "
        r"given \(2, 4\)",
    ),
    "labels of a list": ("classifier", {"labels": [1, 2]}, "`labels` must be a torch tensor"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls_name_the_argument(case):
    head, call, message = WRONG_CALLS[case]
    with pytest.raises(InputError, match=message):
        made(head)(**{"pixel_values": IMAGES, **call})


def test_decoding_to_another_patch_side_is_refused():
    built = made("decoder", config_of(encoder_stride=4))
    with pytest.raises(InputError, match=r"`patch_size` and `encoder_stride` .*8 and 4"):
        built(IMAGES, bool_masked_pos=torch.ones(2, 16))


def test_configurations_nobody_can_build():
    with pytest.raises(ConfigError, match="`config` must be a ViTConfig; given dict"):
        vit_torch.ViTModel({"hidden_size": 48})
    config = config_of()
    config.num_attention_heads = 7
    with pytest.raises(ConfigError, match=r"`hidden_size` must be a multiple .* 48 and 7"):
        vit_torch.ViTModel(config)
    built = vit_torch.ViTModel(reference_config(config_of()))  # Transformers' own will do
    assert type(built.config) is ViTConfig


def test_random_numbers_elsewhere_are_not_disturbed_by_loading(tmp_path):
    weights = random_weights(config_of())
    save_file({n: w.astype(np.float32) for n, w in weights.items()}, tmp_path / "model.safetensors")
    config_of().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit_torch.ViTModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
