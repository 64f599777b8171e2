"""Masked patches and distillation: beside Transformers, and the formulas of facebookresearch/deit
in torch's functions."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from networks import flax_twin, make_config, random_weights
from torch.nn import functional as F

import vit_flax
from vit_common.errors import CheckpointError, InputError
from vit_common.families import BeitConfig, DeiTConfig
from vit_common.images.processor import ViTImageProcessor
from vit_common.recipes import Recipe
from vit_flax.training import Teacher, TrainState, make_step, task_of
from vit_flax.training.tasks.distill import check_classes
from vit_flax.training.tasks.masked import MaskGenerator

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "image_size": 16, "patch_size": 4, "encoder_stride": 4}
K, B = 5, 4
MIM = Recipe(task="mim", mask_ratio=0.5, mask_patch_size=8)


def config_of(family=None, **fields):
    if family is None:
        return make_config(**{**SIZES, **fields})
    return family(**{**SIZES, "num_labels": K, **fields})


def twin(name, config, head, seed=0, **kwargs):
    """Our model, and Transformers' with the same weights, both in float64."""
    weights = random_weights(config, head, seed, **kwargs)
    peer = getattr(transformers, name)(
        getattr(transformers, type(config).__name__)(**config.to_dict())
    ).to(torch.float64)
    ours = flax_twin(getattr(vit_flax, f"Flax{name}"), config, weights, jnp.float64)
    state = {key: torch.tensor(value) for key, value in weights.items()}
    return ours, peer, state


def images(seed=3, dtype=np.float64, batch=B):
    return np.random.default_rng(seed).normal(size=(batch, 3, 16, 16)).astype(dtype)


def masks(seed=5, batch=B):
    return np.random.default_rng(seed).random((batch, 16)) < 0.5


def value(total):
    return float(total.sum / total.count)


# -- masks


class TheirMasks:
    """`MaskGenerator` of Transformers 4.57.6 (`examples/pytorch/image-pretraining/run_mim.py`)."""

    def __init__(self, input_size=192, mask_patch_size=32, model_patch_size=4, mask_ratio=0.6):
        self.rand_size = input_size // mask_patch_size
        self.scale = mask_patch_size // model_patch_size
        self.token_count = self.rand_size**2
        self.mask_count = int(np.ceil(self.token_count * mask_ratio))

    def __call__(self, permutation):
        mask_idx = permutation[: self.mask_count]
        mask = np.zeros(self.token_count, dtype=int)
        mask[mask_idx] = 1
        mask = mask.reshape((self.rand_size, self.rand_size))
        return mask.repeat(self.scale, axis=0).repeat(self.scale, axis=1).flatten()


@pytest.mark.parametrize(("side", "square", "ratio"), [(32, 8, 0.6), (24, 12, 0.3), (16, 4, 1.0)])
def test_masks_are_those_of_run_mim(side, square, ratio):
    ours = MaskGenerator(config_of(image_size=side), square, ratio)
    theirs = TheirMasks(side, square, 4, ratio)
    order = np.random.default_rng(1).permutation(ours.squares)
    np.testing.assert_array_equal(ours(np.random.default_rng(1)), theirs(order))


def test_masks_on_the_device_hide_as_many_squares_everywhere():
    generator = MaskGenerator(config_of(image_size=(16, 32)), 8, 0.3)
    found = np.asarray(generator.on_device(jax.random.key(0), 512)).reshape(-1, 4, 8)
    squares = found[:, ::2, ::2]
    np.testing.assert_array_equal(found, squares.repeat(2, axis=1).repeat(2, axis=2))
    assert (squares.sum(axis=(1, 2)) == 3).all()  # ceil(0.3 * 8)
    # Each square of 512 * 3 / 8 = 192: five standard deviations.
    assert (np.abs(squares.sum(axis=0) - 192) < 5 * np.sqrt(512 * 3 / 8 * 5 / 8)).all()


def test_masks_of_an_image_depend_on_nothing_else_in_the_batch():
    generator = MaskGenerator(config_of(), 4, 0.5)
    rows = generator.of(0, 3, np.array([7, 2, -1]))
    np.testing.assert_array_equal(generator.of(0, 3, np.array([2]))[0], rows[1])
    assert (generator.of(0, 4, np.array([2]))[0] != rows[1]).any()
    assert (generator.of(1, 3, np.array([2]))[0] != rows[1]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_patch_size": 6}, "`mask_patch_size` must be a multiple of the patch, 4 x 4"),
        ({"mask_patch_size": 12}, "`mask_patch_size` must divide the image, 16 x 16"),
        ({"mask_ratio": 0.0}, "`mask_ratio` must be more than 0"),
    ],
)
def test_masks_that_cannot_be_are_refused(fields, message):
    model = vit_flax.FlaxViTForMaskedImageModeling(config_of(), _do_init=False)
    with pytest.raises(InputError, match=message):
        task_of(MIM.replace(**fields), model)


# -- masked image modelling


@pytest.mark.parametrize("family", ["ViT", pytest.param("DeiT", marks=pytest.mark.slow)])
def test_reconstruction_is_transformers_loss(family):
    config = config_of(DeiTConfig if family == "DeiT" else None)
    with jax.enable_x64(True):
        ours, peer, state = twin(
            f"{family}ForMaskedImageModeling", config, "decoder", use_mask_token=True
        )
        peer.load_state_dict(state)
        task = task_of(MIM, ours)
        x, mask = images(), masks()
        x64 = torch.tensor(x), torch.tensor(mask, dtype=torch.float64)  # or 1e-5 is lost in float32
        want = peer(x64[0], bool_masked_pos=x64[1]).loss.item()
        batch = {"pixel_values": jnp.asarray(x), "bool_masked_pos": jnp.asarray(mask)}
        outputs = ours(**batch)
        assert value(task.loss(outputs, batch)) == pytest.approx(want, rel=1e-12)
        # A row of weight 0 does not count, whatever is in it.
        want = peer(x64[0][:3], bool_masked_pos=x64[1][:3]).loss.item()
        broken = batch["pixel_values"].at[3].set(jnp.nan)
        weighted = {**batch, "pixel_values": broken, "weights": jnp.asarray([1.0, 1, 1, 0])}
        assert value(task.loss(outputs, weighted)) == pytest.approx(want, rel=1e-12)


def test_a_step_of_masked_image_modelling_is_that_of_torch():
    """Gradients and the update too, of a batch in two parts."""
    with jax.enable_x64(True):
        ours, peer, state = twin(
            "ViTForMaskedImageModeling", config_of(), "decoder", use_mask_token=True
        )
        peer.load_state_dict(state)
        task = task_of(MIM, ours)
        batch = {"pixel_values": images(), "bool_masked_pos": masks()}
        optimizer = torch.optim.SGD(peer.parameters(), 0.1)
        loss = peer(**{n: torch.tensor(v, dtype=torch.float64) for n, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        want = flax_twin(
            type(ours), ours.config, {n: p.detach().numpy() for n, p in peer.state_dict().items()}
        )
        sgd = optax.sgd(0.1)
        step = make_step(ours, task.loss, sgd, prepare=task.prepare, accumulate=2)
        after, metrics = step(TrainState.create(ours, sgd), {**batch, **task.constants})
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-12)
        found = flatten_dict(after.params)
        for path, array in flatten_dict(want.params).items():
            np.testing.assert_allclose(found[path], array, atol=1e-7, err_msg=str(path))


def test_masks_come_from_the_key_of_the_step():
    task = task_of(MIM, vit_flax.FlaxViTForMaskedImageModeling(config_of(), _do_init=False))
    batch = {"pixel_values": jnp.asarray(images(dtype=np.float32))}
    one, again, other = (
        task.prepare(batch, jax.random.key(i))["bool_masked_pos"] for i in (0, 0, 1)
    )
    assert one.shape == (B, 16)
    assert (one.sum(axis=1) == 8).all()
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert len({tuple(row) for row in np.asarray(one).tolist()}) > 1  # each image its own


def test_visual_tokens_are_beits_loss():
    fields = {"vocab_size": 11, "use_mask_token": True, "use_absolute_position_embeddings": True}
    config = config_of(BeitConfig, **fields)
    with jax.enable_x64(True):
        ours, peer, state = twin(
            "BeitForMaskedImageModeling", config, "tokens", use_mask_token=True
        )
        peer.load_state_dict(
            {name.removeprefix("lm_") if "norm" in name else name: v for name, v in state.items()}
        )
        task = task_of(MIM, ours, tokens=True)
        x, mask = images(), masks()
        labels = np.random.default_rng(0).integers(0, 11, (B, 16))
        want = peer(
            torch.tensor(x),
            bool_masked_pos=torch.tensor(mask),
            labels=torch.tensor(labels[mask]),
        )
        batch = {
            "pixel_values": jnp.asarray(x),
            "bool_masked_pos": jnp.asarray(mask),
            "labels": jnp.asarray(labels),
        }
        outputs = ours(batch["pixel_values"], bool_masked_pos=batch["bool_masked_pos"])
        total = task.loss(outputs, batch)
        assert value(total) == pytest.approx(want.loss.item(), rel=1e-12)
        right = (want.logits[torch.tensor(mask)].argmax(-1).numpy() == labels[mask]).sum()
        assert int(total.metrics["accuracy"]) == right


def test_heads_that_cannot_do_a_task_are_refused_by_name():
    beit = vit_flax.FlaxBeitForMaskedImageModeling(
        config_of(BeitConfig, vocab_size=11), _do_init=False
    )
    with pytest.raises(InputError, match="FlaxBeitForMaskedImageModeling predicts visual tokens"):
        task_of(MIM, beit)
    classifier = vit_flax.FlaxViTForImageClassification(config_of(), _do_init=False)
    with pytest.raises(InputError, match="FlaxViTForImageClassification has none"):
        task_of(MIM, classifier)
    with pytest.raises(InputError, match="the task 'classify' needs a classifier"):
        task_of(Recipe(), vit_flax.FlaxViTModel(config_of(), _do_init=False))
    with pytest.raises(InputError, match="`task` must be"):
        task_of(Recipe(task="gan"), classifier)
    with pytest.raises(InputError, match="a teacher was given, and the task is 'classify'"):
        task_of(Recipe(), classifier, teacher="some/model")
    with pytest.raises(InputError, match="the task 'distill' needs a teacher"):
        task_of(Recipe(task="distill"), classifier)


# -- distillation


def deits(kind, outputs, outputs_kd, teacher_outputs, labels, alpha, tau, smoothing):
    """`DistillationLoss.forward` of facebookresearch/deit (`losses.py`), with timm's
    `LabelSmoothingCrossEntropy` as its base, which is torch's."""
    base_loss = F.cross_entropy(outputs, labels, label_smoothing=smoothing)
    if kind == "soft":
        T = tau
        distillation_loss = (
            F.kl_div(
                F.log_softmax(outputs_kd / T, dim=1),
                F.log_softmax(teacher_outputs / T, dim=1),
                reduction="sum",
                log_target=True,
            )
            * (T * T)
            / outputs_kd.numel()
        )
    else:
        distillation_loss = F.cross_entropy(outputs_kd, teacher_outputs.argmax(dim=1))
    return base_loss * (1 - alpha) + distillation_loss * alpha


def classifiers():
    """A distilled DeiT and a plain ViT to learn, and another ViT to teach."""
    deit = twin("DeiTForImageClassificationWithTeacher", config_of(DeiTConfig), "teacher", seed=1)
    vit = twin("ViTForImageClassification", config_of(), "classifier", seed=2)
    teacher = twin("ViTForImageClassification", config_of(hidden_size=24), "classifier", seed=3)
    for _, peer, state in (deit, vit, teacher):
        peer.load_state_dict(state)
    return deit, vit, teacher


@pytest.mark.parametrize("kind", ["soft", pytest.param("hard", marks=pytest.mark.slow)])
def test_distillation_is_deits_loss(kind):
    recipe = Recipe(
        task="distill",
        distillation=kind,
        distillation_alpha=0.3,
        distillation_temperature=2.5,
        label_smoothing=0.1,
    )
    labels = np.random.default_rng(0).integers(0, K, B)
    with jax.enable_x64(True):
        deit, vit, teacher = classifiers()
        x = torch.tensor(images())
        told = teacher[1](x).logits.detach()
        for ours, peer, _ in (deit, vit):
            out = peer.eval()(x)
            heads = (
                (out.cls_logits, out.distillation_logits) if peer is deit[1] else 2 * [out.logits]
            )
            want = deits(kind, *heads, told, torch.tensor(labels), 0.3, 2.5, 0.1).item()
            task = task_of(recipe, ours, teacher[0])
            batch = {"pixel_values": jnp.asarray(images()), "labels": jnp.asarray(labels)}
            batch = task.prepare({**batch, **task.constants}, jax.random.key(0))
            np.testing.assert_allclose(batch["teacher_logits"], told.numpy(), atol=1e-12)
            total = task.loss(ours(batch["pixel_values"]), batch)
            assert value(total) == pytest.approx(want, rel=1e-12)
            agree = (heads[1].argmax(1) == told.argmax(1)).sum().item()
            assert int(total.metrics["teacher_agreement"][0]) == agree
            # Rows that do not count: one without a label, one that was not read.
            some = labels.copy()
            some[1] = -100
            part = {**batch, "labels": jnp.asarray(some), "weights": jnp.asarray([1.0, 1, 0, 1])}
            two = [each[[0, 3]] for each in (*heads, told, torch.tensor(labels))]
            want = deits(kind, *two, 0.3, 2.5, 0.1).item()
            assert value(task.loss(ours(batch["pixel_values"]), part)) == pytest.approx(want)


@pytest.mark.slow
def test_a_step_with_a_teacher_in_parts():
    """One program, which does not hold the teacher's parameters; two parts are the whole."""
    recipe = Recipe(task="distill", distillation="hard", mixup=1.0, distillation_alpha=0.5)
    with jax.enable_x64(True):
        _, (student, _, _), (teacher, _, _) = classifiers()
        before = jax.tree.map(np.array, teacher.params)
        batch = {"pixel_values": images(), "labels": np.array([0, 1, 2, 3])}
        found = []
        for parts in (1, 2):
            task = task_of(recipe.replace(accumulate=parts), student, teacher)
            sgd = optax.sgd(0.1)
            step = make_step(student, task.loss, sgd, prepare=task.prepare, accumulate=parts)
            state = TrainState.create(student, sgd, key=jax.random.key(1))
            whole = {**batch, **task.constants}
            if parts == 1:
                text = step.lower(state, whole).as_text()
                numbers = sum(x.size for x in jax.tree.leaves(teacher.params))
                assert len(text) < 8 * 2 * numbers + 200_000
                assert "dense_resource" not in text
            state, metrics = step(state, whole)
            found.append((float(metrics["loss"]), flatten_dict(state.params)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
        for path, array in found[0][1].items():
            np.testing.assert_allclose(array, found[1][1][path], atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, before, teacher.params)


@pytest.mark.parametrize("size", [16, 8, pytest.param(24, marks=pytest.mark.slow)])
def test_the_teacher_sees_its_own_preprocessing(size):
    """Of the same 8-bit pixels where the sizes are equal; resized in the program where not."""
    student = flax_twin(
        vit_flax.FlaxViTForImageClassification,
        config_of(),
        random_weights(config_of(), "classifier"),
    )
    config = config_of(image_size=size)
    peer = transformers.ViTForImageClassification(transformers.ViTConfig(**config.to_dict())).eval()
    weights = random_weights(config, "classifier", 3)
    peer.load_state_dict({n: torch.tensor(v) for n, v in weights.items()})
    model = flax_twin(vit_flax.FlaxViTForImageClassification, config, weights)
    side = {"height": size, "width": size}
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7], "resample": 3}
    pixels = np.random.default_rng(0).integers(0, 256, (B, 16, 16, 3), dtype=np.uint8)
    theirs = transformers.ViTImageProcessor(do_resize=False, **own)
    x = theirs(list(pixels), return_tensors="pt")["pixel_values"]
    if size != 16:
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
    with torch.no_grad():
        want = peer(x).logits.numpy()
    teacher = Teacher(model, ViTImageProcessor(size=side, **own))
    ours = ViTImageProcessor(size={"height": 16, "width": 16})
    recipe = Recipe(task="distill")
    task = task_of(recipe, student, teacher, processor=ours)
    batch = {"pixel_values": pixels, "labels": np.zeros(B, np.int32), **task.constants}
    batch = task.prepare(batch, jax.random.key(0))
    np.testing.assert_allclose(batch["teacher_logits"], want, atol=2e-5)
    wanted = transformers.ViTImageProcessor(do_resize=False)(list(pixels), return_tensors="np")
    np.testing.assert_allclose(batch["pixel_values"], wanted["pixel_values"], atol=1e-6)


def test_teachers_are_loaded_by_name(tmp_path):
    config = transformers.ViTConfig(**config_of().to_dict())
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.1] * 3
    ).save_pretrained(tmp_path / "teacher")
    student = vit_flax.FlaxViTForImageClassification(config_of(), _do_init=False)
    task = task_of(Recipe(task="distill"), student, str(tmp_path / "teacher"))
    assert set(task.constants) == {"constants"}
    transformers.ViTModel(config).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="have no classifier, so there is nothing to learn"):
        task_of(Recipe(task="distill"), student, str(tmp_path / "bare"))


def test_a_teacher_of_other_classes_is_refused_in_one_line():
    student, teacher, grey = (
        vit_flax.FlaxViTForImageClassification(config_of(**fields), _do_init=False)
        for fields in ({}, {"num_labels": 7}, {"num_channels": 1})
    )
    recipe = Recipe(task="distill")
    with pytest.raises(InputError, match="the teacher has 7 classes and the student 5") as error:
        task_of(recipe, student, teacher)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="images of 1 channels, and the student of 3"):
        task_of(recipe, student, grey)

    def of(names):
        return config_of(id2label=dict(enumerate(names)), num_labels=None)

    message = "classes in another order: class 1 is 'c' there and 'b' here"
    with pytest.raises(InputError, match=message):
        check_classes(of("abcde"), of("acbde"))
    with pytest.warns(UserWarning, match=r"other names .*'A' for 'a'.* in this order"):
        check_classes(of("abcde"), of("Abcde"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_classes(of("abcde"), of("abcde"))
        check_classes(of("abcde"), config_of())  # which has no names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation_alpha": 1.5}, "`distillation_alpha` must be from 0 to 1"),
        ({"distillation_temperature": 0.0}, "`distillation_temperature` must be more than 0"),
    ],
)
def test_distillation_out_of_range_is_refused(fields, message):
    model = vit_flax.FlaxViTForImageClassification(config_of(), _do_init=False)
    with pytest.raises(InputError, match=message):
        task_of(Recipe(task="distill", **fields), model, model)


def test_ratios_out_of_range_are_refused_without_a_recipe_too():
    with pytest.raises(InputError, match="`mask_ratio` must be over 0, and 1 at most"):
        MaskGenerator(config_of(), 4, 1.5)
