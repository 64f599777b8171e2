"""The output classes beside Transformers' own `ModelOutput`: dictionaries, tuples and pytrees."""

import copy
import dataclasses
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers.modeling_flax_outputs
import transformers.modeling_outputs
from transformers.utils import ModelOutput as TheirOutput

import vit_flax
import vit_torch
from vit_common.outputs import ModelOutput

OF_TOWERS = ("FlaxCLIPOutput", "FlaxSiglipOutput", "FlaxSiglip2Output")  # of both
FLAX = [name for name in vit_flax.__all__ if name.startswith("Flax") and name.endswith("Output")]
ARRAY = np.arange(6.0).reshape(2, 3)


@dataclass
class Ours(ModelOutput):
    a: Any = None
    b: Any = None
    c: Any = None


@dataclass
class Theirs(TheirOutput):
    a: Any = None
    b: Any = None
    c: Any = None


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        ((), {"a": 30}),
        ((), {"a": 30, "c": 10}),
        ((), {"b": 10, "c": 10}),
        ((), {"a": (30, 30)}),
        ((), {"a": ARRAY}),
        (({"a": 30, "b": 10},), {}),
        (([("a", 30), ("b", 10)],), {}),
        ((OrderedDict(c=1, b=2),), {}),
        ((), {}),
    ],
)
def test_made_as_transformers_makes_it(args, fields):
    ours, theirs = Ours(*args, **fields), Theirs(*args, **fields)
    assert set(ours.keys()) == set(theirs.keys())
    assert len(ours) == len(theirs)
    for name in ("a", "b", "c"):
        assert getattr(ours, name) is getattr(theirs, name)
        assert ours.get(name) is theirs.get(name)
    assert [id(v) for v in ours.to_tuple()] == [id(ours[name]) for name in ours]
    assert list(Ours(pair for pair in ours.items())) == list(ours)  # as a DataParallel gathers


def test_bad_pairs_are_refused():
    for one in (Ours, Theirs):
        with pytest.raises(ValueError, match="10"):
            one([("a", 30), (10, 10)])


def test_set_by_attribute_and_by_key():
    for one in (Ours(a=1), Theirs(a=1)):
        one.a = 10
        assert one["a"] == 10
        one["a"] = 20
        assert one.a == 20
        one["b"] = 5
        assert one.b == one["b"] == 5
        assert list(one.keys()) == ["a", "b"]
    late = Ours(c=3)
    late.a = 1  # a field keeps its place
    assert late.to_tuple() == (1, 3)
    late.c = None
    assert late.to_tuple() == (1,)
    assert late.c is None
    late["further"] = 4
    late.b = 2
    assert list(late) == ["a", "b", "further"]
    assert copy.deepcopy(late).further == pickle.loads(pickle.dumps(late))["further"] == 4


def test_fields_are_not_removed():
    for one in (Ours(a=1), Theirs(a=1)):
        for refused in (
            lambda one=one: one.update({"d": 2}),
            lambda one=one: one.pop("a"),
            lambda one=one: one.setdefault("d", 2),
            lambda one=one: one.__delitem__("a"),
        ):
            with pytest.raises(Exception):  # noqa: B017, PT011 (theirs is a bare Exception)
                refused()
        assert dict(one) == {"a": 1}


@pytest.mark.parametrize("name", [name for name in FLAX if name not in OF_TOWERS])
def test_outputs_of_flax(name):
    kind = getattr(vit_flax, name)
    fields = [field.name for field in dataclasses.fields(kind)]
    array = jnp.asarray(ARRAY)
    output = kind(**{fields[0]: array, "hidden_states": (array, array + 1)})
    assert isinstance(output, (dict, OrderedDict))
    assert dict(output).keys() == {fields[0], "hidden_states"}
    for again in (
        copy.copy(output),
        copy.deepcopy(output),
        output.copy(),
        pickle.loads(pickle.dumps(output)),
        dataclasses.replace(output),
        jax.jit(lambda x: x)(output),
        jax.tree.map(lambda x: x, output),
        flax.serialization.from_bytes(output, flax.serialization.to_bytes(output)),
        kind(dict(output)),
        kind(**output),
    ):
        assert type(again) is kind
        assert list(again) == list(output)
        np.testing.assert_array_equal(again[0], ARRAY)
        np.testing.assert_array_equal(again.hidden_states[1], ARRAY + 1)
        assert all(getattr(again, field) is None for field in fields if field not in output)
    batched = jax.vmap(lambda x: kind(**{fields[0]: x, "hidden_states": (x,)}))(array)
    assert batched[0].shape == array.shape
    _, stacked = jax.lax.scan(lambda c, x: (c, kind(**{fields[0]: x})), 0, array)
    assert type(stacked) is kind
    gradient = jax.grad(lambda out: (out[0] ** 2).sum() + out.hidden_states[1].sum())(output)
    np.testing.assert_array_equal(gradient[0], 2 * ARRAY)
    strange = jax.tree.map(lambda x: {"logits": x}, output)  # a leaf is never read as all fields
    assert list(strange) == list(output)
    assert list(getattr(strange, fields[0])) == ["logits"]


def test_state_dicts_as_those_of_transformers():
    theirs = transformers.modeling_flax_outputs.FlaxSequenceClassifierOutput(
        logits=ARRAY, hidden_states=(ARRAY,)
    )
    ours = vit_flax.FlaxSequenceClassifierOutput(logits=ARRAY, hidden_states=(ARRAY,))
    want = flax.serialization.to_state_dict(theirs)
    got = flax.serialization.to_state_dict(ours)
    assert got.pop("loss") is None  # Transformers' Flax class has no loss
    assert jax.tree.structure(got) == jax.tree.structure(want)


def test_a_frozen_subclass():
    """As scripts write outputs of their own for Flax."""

    @flax.struct.dataclass
    class Mine(ModelOutput):
        logits: Any = None
        features: Any = None

    output = jax.jit(lambda x: Mine(logits=x, features=2 * x))(jnp.asarray(ARRAY))
    np.testing.assert_array_equal(output["features"], 2 * ARRAY)
    assert list(output.replace(logits=None)) == ["features"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.logits = 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_outputs_of_torch_are_dictionaries():
    theirs = transformers.modeling_outputs.ImageClassifierOutput(logits=torch.ones(2, 3))
    ours = vit_torch.ImageClassifierOutput(logits=torch.ones(2, 3))
    assert isinstance(ours, OrderedDict)
    assert list(ours) == list(theirs)
    assert {**ours}.keys() == {**theirs}.keys()
    traced = torch.jit.trace(Returns(), torch.ones(2, 3), strict=False, check_trace=False)
    torch.testing.assert_close(traced(torch.ones(2, 3))["logits"], 2 * torch.ones(2, 3))


class Returns(torch.nn.Module):
    def forward(self, x):
        return vit_torch.ImageClassifierOutput(logits=2 * x)
