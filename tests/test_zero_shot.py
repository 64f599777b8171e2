"""Zero-shot classification: probabilities of texts are those of Transformers' CLIPProcessor and
CLIPModel, with tokenizers of both generations of files."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import randomize

from vit_cli.main import main
from vit_common.errors import CheckpointError, ConfigError, InputError, MissingFileError
from vit_common.files.tokenizer import Tokenizer
from vit_flax.inference import ZeroShotClassifier

LABELS = ["a cat", "a dog", "the  Cat's café 42!"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SIZE = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "projection_dim": 20}


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, bytes that end a word, some merges, and what begins and ends a text, as CLIP's."""
    letters = [*transformers.models.clip.tokenization_clip.bytes_to_unicode().values()]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "h"), ("ph", "o")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    return {word: i for i, word in enumerate(words)}, merges


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A CLIP of random weights with `vocab.json` and `merges.txt`; one with `tokenizer.json`
    alone; two images."""
    root = tmp_path_factory.mktemp("zeroshot")
    words, merges = vocabulary()
    (root / "slow").mkdir()
    (root / "slow" / "vocab.json").write_text(json.dumps(words))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (root / "slow" / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(root / "slow")
    config = transformers.CLIPConfig(
        vision_config={**SIZE, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4},
        text_config={
            **SIZE,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "vocab_size": len(words),
            "max_position_embeddings": 24,
            "eos_token_id": words[END],
            "bos_token_id": words[BEGIN],
        },
        projection_dim=20,
    )
    model = randomize(transformers.CLIPModel(config))
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    model.save_pretrained(root / "slow")
    processor.save_pretrained(root / "slow")
    (root / "fast").mkdir()
    tokenizer.backend_tokenizer.save(str(root / "fast" / "tokenizer.json"))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(root / "slow" / name, root / "fast" / name)
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for i, shape in enumerate([(20, 30, 3), (33, 18, 3)]):
        pixels = rng.integers(0, 256, shape, np.uint8)
        PIL.Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    return root


def theirs(place, texts: list[str], **options: Any) -> np.ndarray:
    """Transformers' probabilities, (images, texts)."""
    model = transformers.CLIPModel.from_pretrained(place / "slow").eval()
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor.from_pretrained(place / "slow"),
        transformers.CLIPTokenizerFast.from_pretrained(place / "slow"),
    )
    images = [PIL.Image.open(path) for path in sorted((place / "images").iterdir())]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, **options)
    with torch.no_grad():
        return model(**inputs).logits_per_image.softmax(dim=1).numpy()


def images(place) -> list[str]:
    return [str(path) for path in sorted((place / "images").iterdir())]


@pytest.mark.parametrize("files", ["slow", "fast"])
def test_tokens_are_those_of_transformers(files, place):
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(place / "slow")
    texts = [*LABELS, "", f"a {END} b", "it's\t3 ﬁne ÀÉ 猫 \U0001f600", "x" * 80]
    wanted = tokenizer(texts, padding=True, truncation=True, max_length=24)
    found = Tokenizer(place / files)(texts, most=24)
    assert found.input_ids.tolist() == wanted["input_ids"]
    assert found.attention_mask.tolist() == wanted["attention_mask"]
    assert found.cut == tuple(i for i, text in enumerate(texts) if _tokens(tokenizer, text) > 24)


def test_what_is_no_list_of_texts_is_refused(place):
    """A text by itself would be as many texts as it has characters."""
    tokenizer = Tokenizer(place / "fast")
    for texts in ("a cat", b"a cat", ["a cat", 3], [None], 3, None):
        with pytest.raises(InputError, match="`texts` must be a list of texts"):
            tokenizer(texts, most=24)
    with pytest.raises(InputError, match="at least one text"):
        tokenizer([], most=24)


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("files", ["fast", pytest.param("slow", marks=pytest.mark.slow)])
def test_probabilities_are_those_of_transformers(files, place):
    template = "a photo of a {}"
    wanted = theirs(place, [template.replace("{}", each) for each in LABELS])
    classify = ZeroShotClassifier.from_pretrained(place / files, LABELS, template=template)
    found = classify.run(classify.prepare(images(place)))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    best = classify(images(place), top_k=2)
    assert [[each.index for each in row] for row in best] == [
        np.argsort(-row)[:2].tolist() for row in wanted
    ]
    assert best[0][0].label == LABELS[best[0][0].index]
    assert not any("text_" in name for name in classify.engine.params if name != "text_features")
    # Its image tower gives features, as that of any encoder.
    assert classify.features(images(place)).shape == (2, 24)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_each_text_by_itself_as_siglips_are(family, place, tmp_path):
    """Texts are filled up to the tower's length, and probabilities are sigmoids."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(place / "fast" / "tokenizer.json"), pad_token="!", model_max_length=16
    )
    vision = {**SIZE, "num_hidden_layers": 1, "patch_size": 4}
    vision |= {"image_size": 16} if family == "siglip" else {"num_patches": 16}
    text = {**SIZE, "num_hidden_layers": 1, "vocab_size": len(vocabulary()[0])}
    text |= {"max_position_embeddings": 16, "projection_size": 24}
    for table in (vision, text):
        table.pop("projection_dim")
    capital = family.capitalize()
    config = getattr(transformers, f"{capital}Config")(vision_config=vision, text_config=text)
    model = randomize(getattr(transformers, f"{capital}Model")(config))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    processor = transformers.SiglipImageProcessor(size=size)
    processor.save_pretrained(tmp_path)
    inputs = tokenizer(LABELS, padding="max_length", return_tensors="pt")["input_ids"]
    pictures = [PIL.Image.open(path).convert("RGB") for path in images(place)]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    if family == "siglip2":  # patches, as its own processor would give them
        B, C, H, W = pixels.shape
        pixels = pixels.reshape(B, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(B, 16, 4 * 4 * C)
        more = {"pixel_attention_mask": torch.ones(B, 16, dtype=torch.int64)}
        more["spatial_shapes"] = torch.tensor([[4, 4]] * B)
    else:
        more = {}
    with torch.no_grad():
        wanted = model(input_ids=inputs, pixel_values=pixels, **more).logits_per_image.sigmoid()
    classify = ZeroShotClassifier.from_pretrained(tmp_path, LABELS)
    found = classify.run(classify.prepare(images(place)))
    np.testing.assert_allclose(found, wanted.numpy(), atol=5e-6)
    alone = ZeroShotClassifier.from_pretrained(tmp_path, LABELS[:1])
    np.testing.assert_allclose(alone.run(alone.prepare(images(place))), wanted[:, :1], atol=5e-6)


def test_siglips_texts_are_words_alone(place, tmp_path):
    """`SiglipTokenizer` drops punctuation and case before it looks for words."""
    shutil.copy(place / "fast" / "tokenizer.json", tmp_path / "tokenizer.json")
    named = {"tokenizer_class": "SiglipTokenizer", "pad_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    texts = ["A cat,  a DOG!", "it's (42) cats\n"]
    wanted = ["a cat a dog", "its 42 cats"]  # by its `canonicalize_text`; it needs sentencepiece
    found = Tokenizer(tmp_path)(texts, most=24, to=24)
    plain = Tokenizer(place / "fast")(wanted, most=24, to=24)
    mask = found.attention_mask == 1
    assert (mask == (plain.attention_mask == 1)).all()
    assert (found.input_ids[mask] == plain.input_ids[mask]).all()
    assert set(found.input_ids[~mask]) == {vocabulary()[0]["!"]}


@pytest.mark.slow
def test_old_files_end_a_text_with_their_largest_token(place, tmp_path):
    """Those of before 2023 say 2 for the end of a text."""
    shutil.copytree(place / "slow", tmp_path / "slow")
    shutil.copytree(place / "images", tmp_path / "images")
    table = json.loads((tmp_path / "slow" / "config.json").read_text())
    table["text_config"]["eos_token_id"] = 2
    (tmp_path / "slow" / "config.json").write_text(json.dumps(table))
    classify = ZeroShotClassifier.from_pretrained(tmp_path / "slow", LABELS)
    found = classify.run(classify.prepare(images(tmp_path)))
    np.testing.assert_allclose(found, theirs(tmp_path, LABELS), atol=2e-6)


def test_a_text_that_is_too_long_is_cut_and_named(place):
    texts = ["a cat", "a very long text that no tower of 24 tokens takes"]
    wanted = theirs(place, texts, truncation=True, max_length=24)
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 24 tokens.*a very long"):
        classify = ZeroShotClassifier.from_pretrained(place / "fast", texts)
    found = classify.run(classify.prepare(images(place)))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_the_command_prints_what_the_class_gives(place, tmp_path, capsys):
    arguments = [str(place / "images"), "--model", str(place / "fast")]
    assert main(["zeroshot", *arguments, "--labels", "a cat, a dog", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = theirs(place, ["a cat", "a dog"])
    found = [
        [p["probability"] for p in sorted(row["predictions"], key=lambda p: p["index"])]
        for row in rows
    ]
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    # A file of labels and a template; the rows go to a file, and a run is resumed as it was.
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    options = ["--labels-file", str(tmp_path / "labels.txt"), "--template", "a {}"]
    options += ["--output", str(tmp_path / "out.jsonl")]
    assert main(["zeroshot", *arguments, *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {p["label"] for row in rows for p in row["predictions"]} == {"cat", "dog"}
    best = [row["predictions"][0]["probability"] for row in rows]
    np.testing.assert_allclose(best, wanted.max(axis=1), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "give the texts by --labels or --labels-file; given nothing"),
        (["--labels", "a,b", "--labels-file", "x"], "given both"),
        (["--labels", ""], "texts to choose among; given none"),
        (["--labels", "a cat"], "at least two texts.*given 'a cat'"),
        (["--labels", "a cat,a dog,a cat"], "each text once; given 'a cat' twice"),
        (["--labels", "a cat,,a dog"], "label 2 of 3 is empty"),
        (["--labels", "a,b", "--template", "a photo"], "one {} in it"),
        (["--labels", "a,b", "--template", "{} {}"], "one {} in it"),
        (["--labels-file", "missing.txt"], "missing.txt: cannot be read"),
        (["--labels", "a,b", "--tokenizer", "missing/folder/x"], "missing/folder/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_labels_are_refused_in_one_line(place, options, named, capsys):
    model = ["--model", str(place / "fast")]
    assert main(["zeroshot", str(place / "images"), *model, *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert re.search(named, err), err


def test_models_without_texts_are_refused(place, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no text tower"):
        ZeroShotClassifier.from_pretrained(_vit(tmp_path), LABELS)
    assert main(["zeroshot", str(place / "images"), "--labels", "a,b"]) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.slow
def test_openais_files_need_the_sizes_of_the_text_tower(place, tmp_path):
    from vit_convert import convert

    convert(place / "fast", tmp_path / "clip.pth", to="open_clip")
    given = {"tokenizer": place / "fast"}
    options = {"hidden_act": "quick_gelu", "num_attention_heads": 3, **given}
    with pytest.raises(CheckpointError, match="have a text tower, and nothing says how many heads"):
        ZeroShotClassifier.from_pretrained(tmp_path / "clip.pth", LABELS, **options)
    config = transformers.CLIPConfig.from_pretrained(place / "fast")
    classify = ZeroShotClassifier.from_pretrained(
        tmp_path / "clip.pth", LABELS, config=config, **given
    )
    found = classify.run(classify.prepare(images(place)))
    np.testing.assert_allclose(found, theirs(place, LABELS), atol=2e-6)


def _vit(path):
    sizes = {**SIZE, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    sizes.pop("projection_dim")
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(path)
    return path


def test_tokenizers_that_are_none_are_refused(place, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(place / "fast" / name, bare / name)
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json.*--tokenizer"):
        ZeroShotClassifier.from_pretrained(bare, LABELS)
    # Another folder's does, and so does weights' own folder.
    shutil.copy(place / "fast" / "tokenizer.json", tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path).pad_id == Tokenizer(place / "fast" / "model.safetensors").pad_id
    for text in ("{", "{}", "[]", '{"model": 5}'):
        (bare / "tokenizer.json").write_text(text)
        with pytest.raises(ConfigError, match=r"tokenizer\.json: is no tokenizer"):
            Tokenizer(bare)
    (bare / "tokenizer.json").unlink()
    (bare / "vocab.json").write_text('{"a": 0}')
    (bare / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ConfigError, match=r"has no token .*startoftext"):
        Tokenizer(bare)
    with pytest.raises(InputError, match="`labels` must be a list of texts"):
        ZeroShotClassifier.from_pretrained(place / "fast", [1, 2])


def test_a_tokenizer_of_another_model_is_refused(place, tmp_path):
    words, _ = vocabulary()
    table = json.loads((place / "fast" / "tokenizer.json").read_text())
    table["post_processor"]["sep"] = [END, len(words) + 5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="wanted the tokenizer of this model"):
        ZeroShotClassifier.from_pretrained(place / "fast", LABELS, tokenizer=tmp_path)
