"""The PyTorch twins inside other people's tools: torch's own transformations, Transformers'
`pipeline` and `Trainer`, accelerate and peft.

Results are compared with those of Transformers' own model of the same weights in the same tool.
"""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import images, make_config, random_weights, reference_config, torch_twin
from torch import nn
from torch.func import functional_call, grad, vmap

import vit_torch
from vit_common.errors import InputError

CONFIG = make_config(num_labels=5, image_size=16, patch_size=8)
WEIGHTS = random_weights(CONFIG, "classifier")
LABELS = torch.tensor([3, 1])
ATOL = 2e-5


@pytest.fixture
def twin():
    return torch_twin(vit_torch.ViTForImageClassification, copy.deepcopy(CONFIG), WEIGHTS)


@pytest.fixture
def peer(twin):
    model = transformers.ViTForImageClassification(reference_config(CONFIG)).eval()
    model.load_state_dict(twin.state_dict())
    return model


@pytest.fixture
def x():
    return torch.tensor(images(CONFIG), dtype=torch.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    if "accelerate" in sys.modules:  # it keeps the precision of the last `Trainer`
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def close(got, want, atol=ATOL):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# -- torch's own


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_exported_and_compiled(twin, peer, x):
    with torch.no_grad():
        want = peer(x, labels=LABELS)
        close(torch.jit.trace(twin, x, strict=False)(x)["logits"], want.logits)
        close(torch.export.export(twin, (x,)).module()(x)["logits"], want.logits)
        compiled = torch.compile(twin, fullgraph=True, backend="eager")
        got = compiled(x, labels=LABELS)
    close(got.logits, want.logits)
    close(got.loss, want.loss)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_torch_func(twin, peer, x):
    """Gradients of each image by itself, as differential privacy needs them."""

    def loss(model):
        def of(parameters, image, label):
            inputs = (image[None],), {"labels": label[None]}
            return functional_call(model, parameters, *inputs).loss

        return vmap(grad(of), (None, 0, 0))(dict(model.named_parameters()), x, LABELS)

    got, want = loss(twin), loss(peer)
    assert got.keys() == want.keys()
    for name, value in want.items():
        close(got[name], value, atol=1e-4)
    copies = {name: torch.stack([p, 2 * p]) for name, p in twin.named_parameters()}
    both = vmap(lambda parameters: functional_call(twin, parameters, (x,)).logits)(copies)
    close(both[0], peer(x).logits)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_visual_tokens_under_torch_func():
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = vit_torch.BeitConfig(
        **sizes, image_size=16, patch_size=8, vocab_size=11, use_mask_token=True
    )
    model = vit_torch.BeitForMaskedImageModeling(config).eval()
    pixels, mask = torch.randn(3, 3, 16, 16), torch.tensor([[1, 0, 1, 1]] * 3)
    labels = torch.randint(0, 11, (3, 4))

    def loss(image, masked, label):
        return model(image[None], bool_masked_pos=masked[None], labels=label[None]).loss

    want = torch.stack(
        [
            nn.functional.cross_entropy(
                model(pixels[i : i + 1], bool_masked_pos=mask[i : i + 1]).logits[0][mask[i] > 0],
                labels[i][mask[i] > 0],
            )
            for i in range(3)
        ]
    )
    close(vmap(loss)(pixels, mask, labels), want)


def test_copies(twin, peer, x):
    want = peer(x).logits
    for again in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), nn.DataParallel(twin)):
        close(again(x).logits, want)
    half = copy.deepcopy(twin).half()
    assert half.dtype == half(x).logits.dtype == torch.float16
    assert half.float().dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(twin(x).logits.float(), want, atol=0.2)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(twin, peer, x, kwargs):
    for model in (twin, peer):
        model.train()
        model.gradient_checkpointing_enable(kwargs)
        assert model.is_gradient_checkpointing
        model.enable_input_require_grads()
        model(x, labels=LABELS).loss.backward()
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    for (name, ours), theirs in zip(twin.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4, msg=name)


# -- Transformers


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("package", [transformers, vit_torch])
def test_pipeline(twin, peer, package):
    processor = package.ViTImageProcessor(size={"height": 16, "width": 16})
    got, want = (
        transformers.pipeline("image-classification", model=model, image_processor=processor)(
            picture()
        )
        for model in (twin, peer)
    )
    assert [row["label"] for row in got] == [row["label"] for row in want]
    np.testing.assert_allclose(
        [row["score"] for row in got], [row["score"] for row in want], atol=1e-5
    )


def trained(model, folder, data, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.filterwarnings("ignore")  # theirs, of accelerate and torch
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"label_smoothing_factor": 0.1, "bf16": True}, id="smoothed"),
    ],
)
def test_trainer(twin, peer, x, tmp_path, monkeypatch, options):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # `bf16` sets it for good
    pytest.importorskip("accelerate")
    rng = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 16, 16, generator=rng), "labels": i % 5} for i in range(8)
    ]
    runs = {}
    for name, model in (("ours", twin), ("theirs", peer)):
        trainer = trained(model, tmp_path / name, data, **options)
        trainer.train()
        runs[name] = trainer.evaluate()["eval_loss"], trainer.predict(data).predictions
        trainer.save_model(str(tmp_path / name / "saved"))
    atol = 0.05 if options else 1e-3
    np.testing.assert_allclose(runs["ours"][0], runs["theirs"][0], atol=atol)
    np.testing.assert_allclose(runs["ours"][1], runs["theirs"][1], atol=4 * atol)
    # Transformers writes a config.json beside the weights of its own classes only.
    with pytest.raises(OSError, match=r"Pass `config=` .* `Trainer` save none"):
        type(twin).from_pretrained(tmp_path / "ours" / "saved")
    again = type(twin).from_pretrained(tmp_path / "ours" / "saved", config=twin.config)
    for name, value in twin.state_dict().items():
        close(again.state_dict()[name], value, atol=0)
    resumed = trained(twin, tmp_path / "ours", data).train(resume_from_checkpoint=True)
    assert resumed.global_step == 4


# -- accelerate and peft


@pytest.mark.filterwarnings("ignore")
def test_accelerate(twin, peer, x, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    for model in (twin, peer):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(prepared(x, labels=LABELS).loss)
        optimizer.step()
    want = peer(x).logits
    close(twin(x).logits, want, atol=1e-4)
    unwrapped = accelerator.unwrap_model(twin)
    unwrapped.save_pretrained(
        tmp_path / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(twin),
    )
    close(type(twin).from_pretrained(tmp_path / "saved")(x).logits, want, atol=1e-4)
    accelerator.save_model(twin, tmp_path / "weights")
    with accelerate.init_empty_weights():
        empty = type(twin)(CONFIG)
    names = empty._no_split_modules
    placed = accelerate.infer_auto_device_map(empty, {"cpu": 2**30}, no_split_module_classes=names)
    assert set(placed.values()) == {"cpu"}
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "weights" / "model.safetensors"), device_map={"": "cpu"}
    )
    close(loaded(x).logits, want, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_peft(twin, peer, x, tmp_path):
    peft = pytest.importorskip("peft")
    options = {
        "r": 4,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "init_lora_weights": False,
    }
    adapted = {}
    for model in (twin, peer):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        wrapped(pixel_values=x, labels=LABELS).loss.backward()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad
        adapted[model] = wrapped.eval()
    counts = [wrapped.get_nb_trainable_parameters() for wrapped in adapted.values()]
    assert counts[0] == counts[1]
    want = adapted[peer](x).logits
    assert not torch.allclose(want, peer(x).logits, atol=1e-2)
    close(adapted[twin](x).logits, want, atol=1e-4)
    adapted[twin].save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path / "adapter").eval()
    close(again(x).logits, want, atol=1e-4)
    merged = again.merge_and_unload()
    assert type(merged) is type(twin)
    merged.save_pretrained(tmp_path / "merged")
    close(type(twin).from_pretrained(tmp_path / "merged")(x).logits, want, atol=1e-4)


# -- state dicts of Transformers' models


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BeitForMaskedImageModeling", {"vocab_size": 7}),
        ("Dinov2Model", {}),
        ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegistersForImageClassification", {}),
    ],
)
def test_state_dicts_with_other_names(name, fields):
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"image_size": 16, "patch_size": 8, **fields}
    cls = getattr(vit_torch, name)
    theirs = getattr(transformers, name)(
        getattr(transformers, cls.config_class.__name__)(**sizes)
    ).eval()
    ours = cls(cls.config_class(**sizes)).eval()
    state = theirs.state_dict()
    names = list(state)
    assert set(names) != set(ours.state_dict())
    ours.load_state_dict(state)
    assert list(state) == names
    pixels = torch.randn(2, 3, 16, 16)
    close(ours(pixels)[0], theirs(pixels)[0])
    holder = nn.ModuleDict({"backbone": cls(cls.config_class(**sizes)).eval()})
    holder.load_state_dict({f"backbone.{key}": value for key, value in state.items()})
    close(holder["backbone"](pixels)[0], theirs(pixels)[0])


# -- modules that stand alone


def test_parts_alone(twin, peer, x):
    hidden = torch.randn(2, 5, CONFIG.hidden_size)
    mask = torch.rand(CONFIG.num_hidden_layers, CONFIG.num_attention_heads)
    for path in ("encoder.layer.0", "encoder.layer.0.attention", "encoder.layer.0.intermediate"):
        ours, theirs = (model.vit.get_submodule(path) for model in (twin, peer))
        close(ours(hidden), theirs(hidden))
    close(twin.vit.encoder(hidden).last_hidden_state, peer.vit.encoder(hidden).last_hidden_state)
    close(twin.vit.embeddings(x), peer.vit.embeddings(x))
    spread = peer.get_head_mask(mask, CONFIG.num_hidden_layers)
    close(
        twin.vit.encoder(hidden, mask).last_hidden_state,
        peer.vit.encoder(hidden, spread).last_hidden_state,
    )
    layers = (model.vit.encoder.layer[0].attention.attention for model in (twin, peer))
    for ours, theirs in zip(*(model_hooks(layer, hidden) for layer in layers), strict=True):
        close(ours, theirs)
    names = {name for name, _ in peer.named_modules()}
    assert names - {name for name, _ in twin.named_modules()} == {
        name for name in names if name.endswith(("intermediate_act_fn", "pooler.activation"))
    }


@pytest.mark.parametrize("family", ["DeiT", "Beit", "Dinov2", "Dinov2WithRegisters"])
def test_parts_alone_in_every_family(family):
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"image_size": 16, "patch_size": 8}
    cls, their_class = (getattr(package, f"{family}Model") for package in (vit_torch, transformers))
    theirs = their_class(their_class.config_class(**sizes, attn_implementation="eager")).eval()
    ours = cls(cls.config_class(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 5, 24)
    parts = ["encoder.layer.0", "encoder.layer.0.attention", "encoder.layer.0.attention.output"]
    parts += ["encoder.layer.0.norm1", "encoder.layer.0.norm2"] if "Dino" in family else []
    for path in parts:
        a, b = (model.get_submodule(path) for model in (ours, theirs))
        arguments = (hidden, hidden) if path.endswith("output") else (hidden,)
        close(a(hidden), b(*arguments))
    close(ours.encoder(hidden)[0], theirs.encoder(hidden)[0])
    pixels = torch.randn(2, 3, 16, 16)
    mine, want = (
        model(pixels, output_attentions=True, output_hidden_states=True) for model in (ours, theirs)
    )
    close(mine.attentions, want.attentions)
    close(mine.hidden_states, want.hidden_states)


def model_hooks(layer, hidden):
    """What a forward hook sees with the kernel that forms probabilities."""
    layer.config._attn_implementation = "eager"
    seen = []
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.extend(output))
        layer(hidden)
        handle.remove()
    return seen


def test_hidden_states_by_hooks(twin, peer, x):
    found = {}
    for model in (twin, peer):
        seen = found[model] = []
        for layer in model.vit.encoder.layer:
            layer.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        model(x)
    for ours, theirs in zip(found[twin], found[peer], strict=True):
        close(ours, theirs)


# -- classes of one's own


def classes(package):
    class Regressor(package.ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.vit = package.ViTModel(config, add_pooling_layer=False)
            self.regressor = nn.Sequential(
                nn.BatchNorm1d(config.hidden_size), nn.Linear(config.hidden_size, 2)
            )
            self.register_buffer("scale", torch.tensor([3.0]), persistent=False)
            self.post_init()

        def forward(self, pixel_values):
            return self.scale * self.regressor(self.vit(pixel_values).last_hidden_state[:, 0])

    class Deep(package.ViTForImageClassification):
        def __init__(self, config, width=7):
            super().__init__(config)
            self.classifier = nn.Sequential(
                nn.Linear(config.hidden_size, width), nn.Tanh(), nn.Linear(width, 3)
            )
            self.post_init()

        def forward(self, pixel_values):
            return super().forward(pixel_values).logits

    class Renamed(package.ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.backbone = package.ViTModel(config)
            self.fc = nn.Linear(config.hidden_size, 2)
            self.post_init()

        def forward(self, pixel_values):
            return self.fc(self.backbone(pixel_values).pooler_output)

    return Regressor, Deep, Renamed


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize("index", range(3), ids=["head", "replaced", "renamed"])
def test_a_class_of_ones_own(index, x, tmp_path):
    ours, theirs = classes(vit_torch)[index], classes(transformers)[index]
    fields = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 2}
    config = ours.config_class(num_hidden_layers=1, **fields)
    drawn = ours(config)
    for module in drawn.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std() < 0.03  # as Transformers draws it, and not as torch does
            assert not module.bias.any()
    with torch.no_grad():
        for parameter in drawn.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    drawn.eval().save_pretrained(tmp_path / "ours")
    want = drawn(x)
    again = ours.from_pretrained(tmp_path / "ours")
    close(again(x), want, atol=0)
    assert not again.training
    assert again.name_or_path == str(tmp_path / "ours")
    read = theirs.from_pretrained(tmp_path / "ours").eval()
    close(read(x), want)
    read.save_pretrained(tmp_path / "theirs")
    back = ours.from_pretrained(tmp_path / "theirs", attn_implementation="eager", dtype="float64")
    assert back.attn_implementation == back.config._attn_implementation == "eager"
    close(back(x.double()).float(), want)
    with pytest.raises(InputError, match=r'parts of its own .* only `to="hub"` can hold'):
        again.save_pretrained(tmp_path / "flax", to="flax")


def test_a_class_of_ones_own_from_a_base_checkpoint(x, tmp_path):
    Regressor, Deep, _ = classes(vit_torch)
    base = vit_torch.ViTModel(CONFIG).eval()
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"train them: regressor\.0\.weight.*regressor\.1\.bias"):
        model = Regressor.from_pretrained(tmp_path)
    close(model.vit(x).last_hidden_state, base(x).last_hidden_state, atol=0)
    assert 0.0 < model.regressor[1].weight.std() < 0.03
    assert model.scale == 3.0
    with pytest.warns(UserWarning, match=r"train them: classifier\.0\.weight"):
        Deep.from_pretrained(tmp_path, width=4)
    with pytest.raises(vit_torch.pretrained.InputError, match="has no keyword 'wide'"):
        Deep.from_pretrained(tmp_path, wide=4)
    model.base_model.save_pretrained(tmp_path / "network")
    network = vit_torch.ViTModel.from_pretrained(tmp_path / "network", add_pooling_layer=False)
    close(network(x)[0], base(x)[0], atol=0)


def test_a_part_assigned_to_a_model(twin, x, tmp_path):
    twin.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(CONFIG.hidden_size, 5)).eval()
    want = twin(x).logits
    twin.save_pretrained(tmp_path)
    again = torch_twin(vit_torch.ViTForImageClassification, CONFIG, WEIGHTS)
    again.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(CONFIG.hidden_size, 5)).eval()
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    close(again(x).logits, want, atol=0)


# -- attributes of PreTrainedModel

# attribute -> how it is asked for; the answer is to be Transformers'
ASKED = {
    "num_parameters": lambda m: m.num_parameters(),
    "num_parameters(only_trainable)": lambda m: frozen(m).num_parameters(only_trainable=True),
    "num_parameters(exclude_embeddings)": lambda m: m.num_parameters(exclude_embeddings=True),
    "get_memory_footprint": lambda m: m.get_memory_footprint(),
    "device": lambda m: m.device,
    "dtype": lambda m: m.dtype,
    "half": lambda m: copy.deepcopy(m).half().dtype,
    "to": lambda m: copy.deepcopy(m).to("cpu", torch.float64).dtype,
    "framework": lambda m: m.framework,
    "base_model": lambda m: m.base_model is m.vit,
    "base_model_prefix": lambda m: m.base_model_prefix,
    "main_input_name": lambda m: m.main_input_name,
    "get_input_embeddings": lambda m: m.get_input_embeddings() is m.vit.embeddings.patch_embeddings,
    "get_output_embeddings": lambda m: m.get_output_embeddings(),
    "can_generate": lambda m: m.can_generate(),
    "is_encoder_decoder": lambda m: m.config.is_encoder_decoder,
    "supports_gradient_checkpointing": lambda m: m.supports_gradient_checkpointing,
    "is_gradient_checkpointing": lambda m: m.is_gradient_checkpointing,
    "_no_split_modules": lambda m: m._no_split_modules,
    "_keys_to_ignore_on_save": lambda m: m._keys_to_ignore_on_save,
    "_keys_to_ignore_on_load_missing": lambda m: m._keys_to_ignore_on_load_missing,
    "_keys_to_ignore_on_load_unexpected": lambda m: m._keys_to_ignore_on_load_unexpected,
    "_tied_weights_keys": lambda m: m._tied_weights_keys,
    "_supports_sdpa": lambda m: m._supports_sdpa,
    "_commit_hash": lambda m: m.config._commit_hash,
    "name_or_path": lambda m: m.name_or_path,
    "warnings_issued": lambda m: m.warnings_issued,
    "model_tags": lambda m: m.model_tags,
    "add_model_tags": lambda m: tagged(copy.deepcopy(m)),
    "floating_point_ops": lambda m: m.floating_point_ops({"pixel_values": torch.zeros(2, 3, 4, 4)}),
    "tie_weights": lambda m: m.tie_weights(),
    "hf_device_map": lambda m: getattr(m, "hf_device_map", None),
    "set_attn_implementation": lambda m: with_kernel(copy.deepcopy(m)),
    "patches": lambda m: [
        getattr(m.vit.embeddings.patch_embeddings, name)
        for name in ("image_size", "patch_size", "num_channels", "num_patches")
    ],
    "heads": lambda m: [
        getattr(m.vit.encoder.layer[0].attention.attention, name)
        for name in ("num_attention_heads", "attention_head_size", "all_head_size")
    ],
    "mask_token": lambda m: m.vit.embeddings.mask_token,
    "tensors": lambda m: {name: p.shape for name, p in m.named_parameters()},
}


def frozen(model):
    model = copy.deepcopy(model)
    model.base_model.requires_grad_(False)
    return model


def tagged(model):
    model.add_model_tags("one")
    model.add_model_tags(["two", "one"])
    return model.model_tags


def with_kernel(model):
    kernels = []
    for name in ("eager", "sdpa", {"": "eager"}):
        model.set_attn_implementation(name)
        kernels.append(model.config._attn_implementation)
    return kernels


@pytest.mark.parametrize("name", ASKED)
def test_attributes_as_in_transformers(name, twin, peer):
    assert ASKED[name](twin) == ASKED[name](peer)


@pytest.mark.parametrize("given", ["AutoModel", transformers.AutoModelForImageClassification])
def test_register_for_auto_class(given):
    class Ours(vit_torch.ViTModel):
        pass

    class Theirs(transformers.ViTModel):
        pass

    for cls, base in ((Ours, vit_torch.ViTModel), (Theirs, transformers.ViTModel)):
        cls.register_for_auto_class()
        assert cls._auto_class == "AutoModel"
        cls.register_for_auto_class(given)
        assert base._auto_class is None
        with pytest.raises(ValueError, match=r"(?i)auto.class"):
            cls.register_for_auto_class("Model")
    assert Ours._auto_class == Theirs._auto_class


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("masked", [False, True])
def test_parameters_without_a_gradient(family, masked):
    """A mask token without `bool_masked_pos` has none, in Transformers too."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    without = []
    for package in (vit_torch, transformers):
        config = getattr(package, f"{family}Config")(**sizes, image_size=8, patch_size=4)
        model = getattr(package, f"{family}Model")(config)
        mask = {"bool_masked_pos": torch.tensor([[True, False, False, True]])} if masked else {}
        model(torch.randn(1, 3, 8, 8), **mask).last_hidden_state.sum().backward()
        without.append({n for n, p in model.named_parameters() if p.grad is None})
    assert without[0] == without[1] == (set() if masked else {"embeddings.mask_token"})


def test_a_tag_of_one_model_is_no_other_models(twin, peer):
    twin.add_model_tags("one")
    assert type(twin).model_tags is None
    assert twin.model_tags == ["one"]


def test_models_from_a_configuration(peer):
    for build in (vit_torch.ViTModel._from_config, vit_torch.ViTModel.from_config):
        model = build(CONFIG, torch_dtype=torch.bfloat16, attn_implementation="eager")
        theirs = transformers.ViTModel._from_config(
            reference_config(CONFIG), dtype=torch.bfloat16, attn_implementation="eager"
        )
        assert model.dtype == theirs.dtype == torch.bfloat16
        assert model.config._attn_implementation == theirs.config._attn_implementation
    assert CONFIG._attn_implementation is None
    with pytest.raises(InputError, match="`dtype` must be a floating torch dtype"):
        vit_torch.ViTModel._from_config(CONFIG, dtype="int8")


def test_the_kernel_of_the_configuration(x):
    config = make_config(num_labels=5, image_size=16, patch_size=8)
    config._attn_implementation = "eager"
    model = torch_twin(vit_torch.ViTForImageClassification, config, WEIGHTS)
    assert model.vit.encoder.layer[0].attention.attention.attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"  # Transformers' models read it at each call, too
    assert model.vit.encoder.layer[0].attention.attention.attn_implementation == "sdpa"
    eager = torch_twin(
        vit_torch.ViTForImageClassification, config, WEIGHTS, attn_implementation="eager"
    )
    assert (eager.attn_implementation, config._attn_implementation) == ("eager", "sdpa")
    with pytest.raises(InputError, match="`attn_implementation` must be one of"):
        model.set_attn_implementation("flash_attention_2")


def test_new_weights_for_a_whole_model(twin):
    before = {name: p.clone() for name, p in twin.named_parameters()}
    twin.init_weights()  # all of it has been drawn
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())
    twin.apply(twin._init_weights)
    for name, p in twin.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "layernorm" in name:
            assert (p == 1.0).all()
        else:
            assert 0.01 < p.std() < 0.03


def test_what_images_do_not_have(twin, x):
    assert twin.resize_token_embeddings(None) is twin.get_input_embeddings()
    for call in (
        lambda: twin.resize_token_embeddings(100),
        lambda: twin.prune_heads({0: [1]}),
        lambda: twin.set_output_embeddings(nn.Linear(2, 2)),
    ):
        with pytest.raises(InputError, match=r"ViTForImageClassification (has no|does not)"):
            call()
    assert twin.dummy_inputs["pixel_values"].shape == (1, 3, 16, 16)
    twin(**twin.dummy_inputs)
    twin.set_input_embeddings(vit_torch.model.ViTPatchEmbeddings(config=CONFIG))
    assert twin(x).logits.shape == (2, 5)
