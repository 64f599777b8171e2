"""Recipes: what each is said to be, what a setting may be, and settings from texts."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import transformers

from vit_common.errors import InputError
from vit_common.recipes import (
    ALIASES,
    RECIPES,
    SHORT_NAMES,
    Recipe,
    learning_rates,
    parse_settings,
    peak_learning_rate,
    recipe,
)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_can_run(name):
    settings = recipe(name)
    assert settings.name == name
    rates = learning_rates(settings, settings.steps or 1000)
    assert rates.max() == pytest.approx(peak_learning_rate(settings), rel=0.01)
    assert (rates >= 0).all()
    # A record of it, as JSON, makes it again.
    assert Recipe(**json.loads(json.dumps(settings.to_dict()))) == settings
    # What it is published to reach has a source.
    assert settings.source.startswith("https://") or not settings.reaches


def test_names_of_recipes_and_settings():
    """Nearest names are said; short ones are taken."""
    for short, name in ALIASES.items():
        assert recipe(short) == RECIPES[name]
    with pytest.raises(InputError, match=r"no recipe 'vit_paper'\. Did you mean vit-paper\?"):
        recipe("vit_paper")
    with pytest.raises(InputError, match=r"no setting 'layer_decy'\. Did you mean layer_decay\?"):
        recipe("vit", layer_decy=0.7)
    with pytest.raises(InputError, match="no setting 'lr'; it is learning_rate here"):
        recipe("vit", lr=0.1)
    assert set(SHORT_NAMES.values()) <= {field.name for field in dataclasses.fields(Recipe)}


def test_hf_has_the_defaults_of_the_trainer():
    defaults = {
        field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)
    }
    settings = recipe("hf")
    for ours, theirs in {
        "learning_rate": "learning_rate",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "accumulate": "gradient_accumulation_steps",
        "weight_decay": "weight_decay",
        "b1": "adam_beta1",
        "b2": "adam_beta2",
        "eps": "adam_epsilon",
        "clip": "max_grad_norm",
        "schedule": "lr_scheduler_type",
        "label_smoothing": "label_smoothing_factor",
        "warmup_epochs": "warmup_steps",
    }.items():
        assert getattr(settings, ours) == defaults[theirs], ours
    assert defaults["warmup_ratio"] == 0


def test_published_settings():
    """Rates as the named sources give them, at their ends."""
    vit = learning_rates(recipe("vit-paper"), 10_000)
    assert (vit[0], vit[250], vit[500]) == (0.0, 0.015, 0.03)
    assert vit[-1] == pytest.approx(0, abs=1e-8)
    deit = learning_rates(recipe("deit"), 300 * 10)
    assert peak_learning_rate(recipe("deit")) == 1e-3  # 5e-4 * 1024 / 512
    assert deit[:10].tolist() == [1e-6] * 10
    # timm's cosine has run down by the five epochs of the warm-up when that ends.
    wanted = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 5 / 300))
    assert deit[50] == pytest.approx(wanted, rel=1e-12)
    mae = recipe("mae")
    assert peak_learning_rate(mae) == 2e-3  # 5e-4 * 1024 / 256
    assert (mae.layer_decay, mae.layer_decay_rule) == (0.65, "mae")


def test_another_length_keeps_the_share_of_the_warm_up():
    assert recipe("vit", steps=500).warmup_steps == 25
    assert recipe("vit", steps=500, warmup_steps=50).warmup_steps == 50
    shorter = recipe("vit", epochs=10)
    assert (shorter.steps, shorter.warmup_steps, shorter.warmup_epochs) == (None, None, 0.5)
    assert recipe("mae", epochs=10).warmup_epochs == 0.5
    assert recipe("mae", epochs=10, warmup_epochs=2).warmup_epochs == 2
    assert recipe("vit", warmup_epochs=0.5).warmup_steps is None
    assert recipe("fine-tune", batch_size=8) == RECIPES["fine-tune"].replace(batch_size=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "`epochs` must be more than 0"),
        ({"epochs": "5"}, "`epochs` must be a number; given '5'"),
        ({"epochs": None}, "`epochs` must be a number; given None"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"learning_rate": 0}, r"`learning_rate` must be more than 0 \(and finite\); given 0"),
        ({"learning_rate": -1e-3}, "`learning_rate` must be more than 0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be a number; given nan"),
        ({"learning_rate": math.inf}, "`learning_rate` must be more than 0"),
        ({"learning_rate": True}, "`learning_rate` must be a number; given True"),
        ({"batch_size": 30, "accumulate": 4}, "a multiple of `accumulate`; given 30 and 4"),
        ({"batch_size": 8.0}, r"`batch_size` must be a whole number; given 8\.0"),
        ({"warmup_epochs": 10}, "shorter than the run; given 10 of 10 epochs"),
        ({"steps": 5, "warmup_steps": 5}, "given 5 of 5 steps"),
        ({"optimizer": "adam"}, "must be 'adamw', 'sgd', .* or 'lars'; given 'adam'"),
        ({"b2": 1.0}, "`b2` must be 0 or more and less than 1"),
        ({"momentum": -0.1}, "`momentum` must be 0 or more"),
        ({"clip": 0}, "`clip` must be more than 0"),
        ({"layer_decay": 1.5}, "`layer_decay` must be more than 0, and at most 1"),
        ({"mixup": -1}, "`mixup` must be 0 or more"),
        ({"mixup_prob": 1.1}, "`mixup_prob` must be from 0 to 1"),
        ({"crop_scale": (1.0, 0.5)}, r"`crop_scale` must be \(lowest, highest\)"),
        ({"crop_scale": (0.0, 1.0)}, "`crop_scale` must be areas of more than 0"),
        ({"crop_scale": 0.5}, "`crop_scale` must be a pair of numbers or none"),
        ({"image_size": (224, 0)}, "`image_size` must be at least 1"),
        ({"ema": 1.2}, "`ema` must be from 0 to 1"),
        ({"mask_ratio": 1.0}, "`mask_ratio` must be more than 0 and less than 1"),
        ({"lora": -1}, "`lora` must be 0 or more"),
    ],
)
def test_settings_that_no_run_can_have(settings, message):
    with pytest.raises(InputError, match=message):
        recipe(**settings)


def test_the_warm_up_of_a_run_must_end():
    """Steps that only the data decide."""
    settings = recipe(warmup_steps=50)
    with pytest.raises(InputError, match="given 50 of 50 steps"):
        learning_rates(settings, 50)
    assert len(learning_rates(settings, 51)) == 51
    with pytest.raises(InputError, match="at least one step; given 0"):
        learning_rates(settings, 0)


def test_settings_from_texts():
    found = parse_settings(
        [
            "lr=1e-3",
            "layer-decay = 0.75",
            "image_size=384",
            "clip=none",
            "crop_scale=0.08,1",
            "nesterov=yes",
            "auto_augment=none",
            "train=classifier,a=b",
            "warmup=2",
            "optimizer=sgd",
        ]
    )
    assert found == {
        "learning_rate": 1e-3,
        "layer_decay": 0.75,
        "image_size": 384,
        "clip": None,
        "crop_scale": (0.08, 1.0),
        "nesterov": True,
        "auto_augment": None,
        "train": "classifier,a=b",
        "warmup_epochs": 2.0,
        "optimizer": "sgd",
    }
    assert recipe(**found).image_size == 384
    assert parse_settings(["size=224x336"]) == {"image_size": (224, 336)}
    for text, message in (
        ("lr", "must be NAME=VALUE, such as lr=0.01; given 'lr'"),
        ("=3", "must be NAME=VALUE"),
        ("lr=fast", "learning_rate must be a number; given 'fast'"),
        ("lr=nan", "learning_rate must be a number; given 'nan'"),
        ("batch=8.5", "batch_size must be a whole number; given '8.5'"),
        ("nesterov=maybe", "nesterov must be true or false; given 'maybe'"),
        ("schedule=cosin", "schedule must be 'cosine', 'linear' or 'constant'; given 'cosin'"),
        ("layerdecay=1", r"no setting 'layerdecay'\. Did you mean layer_decay\?"),
    ):
        with pytest.raises(InputError, match=message):
            parse_settings([text])
    with pytest.raises(InputError, match="learning_rate is given twice"):
        parse_settings(["lr=1", "learning_rate=2"])
