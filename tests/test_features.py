"""Features and attention of images, against Transformers; heat maps, as pictures."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import randomize

from vit_cli.main import main
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import InputError
from vit_flax.inference import ImageClassifier
from vit_flax.inference.maps import contact_sheet, heat, overlay, patch_map, rollout

TOLERANCE = 2e-5
DIGIT = str(embedded_checkpoint() / "images" / "digit-3-01.png")
FAMILIES = {
    "vit": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        {"intermediate_size": 64, "patch_size": 8, "image_size": 32},
    ),
    "dinov2 with registers": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "patch_size": 8, "image_size": 32},
    ),
    "beit": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {
            "intermediate_size": 64,
            "patch_size": 8,
            "image_size": 32,
            "use_relative_position_bias": True,
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    cls, config_class, fields = FAMILIES[request.param]
    config = config_class(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_labels=3, **fields
    )
    config._attn_implementation = "eager"
    model = randomize(cls(config).eval())
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    rng = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)
    ]
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    inputs = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        base = getattr(model, model.base_model_prefix)
        wanted = base(**inputs, output_hidden_states=True, output_attentions=True)
    return ImageClassifier.from_pretrained(folder), pictures, wanted


def test_features_are_those_of_transformers(pair):
    classify, pictures, wanted = pair
    T = classify.config.num_prefix_tokens
    last = wanted.last_hidden_state.numpy()
    close = {"rtol": 0, "atol": TOLERANCE}
    np.testing.assert_allclose(classify.features(pictures), last[:, 0], **close)
    np.testing.assert_allclose(
        classify.features(pictures, pool="mean"), last[:, T:].mean(1), **close
    )
    np.testing.assert_allclose(classify.features(pictures[1], pool=None), last[1], **close)
    several = classify.features(pictures, layers=[0, -2], pool=None)
    hidden = [wanted.hidden_states[i].numpy() for i in (1, 2)]
    np.testing.assert_allclose(several, np.stack(hidden, axis=1), **close)


def test_attention_is_that_of_transformers(pair):
    classify, pictures, wanted = pair
    found = classify.attention(pictures[:2], layers=[2, 0])
    for i, maps in enumerate(found):
        for layer, attention in zip((2, 0), maps, strict=True):
            np.testing.assert_allclose(
                attention, wanted.attentions[layer][i].numpy(), rtol=0, atol=TOLERANCE
            )


def test_rollout_is_the_papers(pair):
    """Abnar and Zuidema 2020, equation 1: A = 0.5 W + 0.5 I, multiplied over the layers."""
    classify, pictures, wanted = pair
    S = wanted.attentions[0].shape[-1]
    total = torch.eye(S)
    for attention in wanted.attentions:
        total = (0.5 * attention[0].mean(0) + 0.5 * torch.eye(S)) @ total
    found = classify.attention(pictures[0], rollout=True)
    np.testing.assert_allclose(found, total.numpy(), rtol=0, atol=TOLERANCE)


def test_steady_state_compiles_nothing(pair):
    classify, pictures, _ = pair
    classify.features(pictures)
    before = classify.compilations
    for _ in range(3):
        classify.features(list(reversed(pictures)))
        list(classify.stream_features(pictures * 5, batch_size=4))
    assert classify.compilations == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [3]}, "blocks from 0 to 2"),
        ({"layers": []}, "at least one block"),
        ({"layers": [True]}, "blocks from 0 to 2"),
        ({"layers": np.array([True])}, "blocks from 0 to 2"),
        ({"layers": [np.int64(3)]}, "blocks from 0 to 2"),
        ({"pool": "max"}, "`pool` must be 'cls', 'mean' or None"),
    ],
)
def test_what_there_is_not(pair, options, said):
    classify, pictures, _ = pair
    with pytest.raises(InputError, match=said):
        classify.features(pictures[0], **options)


@pytest.mark.parametrize(
    "layers",
    [
        np.array([1, -1]),
        pytest.param([np.int64(1), np.uint8(2)], marks=pytest.mark.slow),
        pytest.param(range(1, 3), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_blocks_by_integers_of_any_type(pair, layers):
    classify, pictures, _ = pair
    close = {"rtol": 0, "atol": TOLERANCE}
    expected = classify.features(pictures[0], layers=[1, 2])
    np.testing.assert_allclose(classify.features(pictures[0], layers=layers), expected, **close)
    alone = classify.features(pictures[0], layers=np.int64(2))
    np.testing.assert_allclose(alone, expected[1], **close)


@pytest.mark.parametrize(("layers", "pool"), [([-1], "cls"), ([0, 2], None)])
def test_features_of_no_image(pair, layers, pool):
    classify, pictures, _ = pair
    found = classify.features([], layers, pool)
    assert found.shape == classify.features(pictures[:1], layers, pool)[:0].shape
    assert found.dtype == np.float32


# -- pictures


def test_colours_grow_with_the_value():
    colours = heat(np.linspace(0, 1, 9)[None])[0]
    assert colours[0].tolist() == [68, 1, 84]
    assert colours[-1].tolist() == [253, 231, 37]
    assert (np.diff(colours.astype(int).sum(-1)) > 0).all()
    assert (heat(np.full((2, 3), 5.0)) == [68, 1, 84]).all()  # nothing stands out


def test_a_map_is_where_its_patch_is():
    """A token that looks at one patch lights that part of the picture and no other."""
    attention = np.zeros((6, 6))
    attention[0, 2 + 1] = 1.0  # two tokens in front, the second of 2 x 2 patches
    values = patch_map(attention, (2, 2), prefix=2)
    assert values.tolist() == [[0, 1], [0, 0]]
    picture = np.asarray(overlay(PIL.Image.new("RGB", (40, 40)), values)).astype(int).sum(-1)
    bright = np.unravel_index(picture.argmax(), picture.shape)
    assert bright[0] < 20 <= bright[1]


def test_a_sheet_holds_every_picture():
    tiles = [PIL.Image.new("RGB", (10, 8), colour) for colour in ("red", "lime", "blue")]
    sheet = contact_sheet(tiles, columns=2, gap=2)
    assert sheet.size == (22, 18)
    assert sheet.getpixel((5, 4)) == (255, 0, 0)
    assert sheet.getpixel((17, 4)) == (0, 255, 0)
    assert sheet.getpixel((5, 14)) == (0, 0, 255)
    assert sheet.getpixel((17, 14)) == (255, 255, 255)


def test_captions_stand_under_their_pictures():
    tiles = [PIL.Image.new("RGB", (160, 80), "red") for _ in range(3)]
    sheet = np.asarray(contact_sheet(tiles, 2, ["image", "", "head 1"]))
    assert sheet.shape == (204, 324, 3)  # letters of 10, in bands of 20
    dark = (sheet < 64).all(axis=-1)
    assert dark[80:100, :160].any()
    assert dark[184:, :160].any()
    dark[80:100, :160] = dark[184:, :160] = False
    assert not dark.any()


def test_no_attention_is_no_rollout():
    with pytest.raises(InputError, match="at least one"):
        rollout([])


def test_the_command(tmp_path, capsys):
    digit = next(iter(sorted((embedded_checkpoint() / "images").iterdir())))
    for extra in ([], ["--rollout"], ["--head", "1", "--layer", "0"]):
        target = tmp_path / f"{len(extra)}.png"
        assert main(["attention", str(digit), "--output", str(target), *extra]) == 0
        with PIL.Image.open(target) as picture:
            assert picture.mode == "RGB"
            assert len(picture.getcolors(1 << 20)) > 10
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "wanted one image"),
        (["a.png"], "--output FILE is needed"),
        (["a.png", "--output", "x.gif"], "--output must end in"),
        (["a.png", "--output", "x.png", "--rollout", "--head", "1"], "leave --head out"),
        (["a.png", "--output", "x.png", "--rollout", "--layer", "-1"], "leave --layer out"),
        (["a.png", "--output", "no/x.png"], "no: no such directory"),
        ([DIGIT, "--output", "x.png", "--layer", "4"], "--layer must be from 0 to 3, or from -4"),
        ([DIGIT, "--output", "x.png", "--layer", "-5"], "to -1; given -5"),
        (["nothing.png", "--output", "x.png"], "nothing.png"),
    ],
)
def test_the_command_refuses(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["attention", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
