"""Exported programs, JAX's and ONNX, against the models of Transformers that have the same weights;
and every way in which a file or a call can be wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import flax_twin, make_config, random_weights, randomize
from tolerances import BOUNDS

import vit_flax.export
import vit_torch
import vit_torch.export
from vit_cli.main import main
from vit_common.errors import CheckpointError, ConfigError, ImageError, InputError, MissingFileError
from vit_common.exports import measure
from vit_common.families import CLIPConfig
from vit_common.images.processor import ViTImageProcessor
from vit_flax import (
    FlaxAutoModel,
    FlaxAutoModelForImageClassification,
    FlaxViTForImageClassification,
    FlaxViTForMaskedImageModeling,
)
from vit_flax.export import export, load
from vit_torch import AutoModel, AutoModelForImageClassification, ViTForImageClassification

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "vit_common" / "digits"
LABELS = ["cat", "dog", "a tree, and more", "Zürich", "写真"]
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "id2label": dict(enumerate(LABELS)),
}
# family -> Transformers' class, and what differs from SIZES
FAMILIES = {
    "vit": ("ViTForImageClassification", {"intermediate_size": 36}),
    "deit": ("DeiTForImageClassificationWithTeacher", {"intermediate_size": 36}),
    "beit": (
        "BeitForImageClassification",
        {"intermediate_size": 36, "use_relative_position_bias": True},
    ),
    "dinov2": ("Dinov2ForImageClassification", {}),
    "registers": ("Dinov2WithRegistersForImageClassification", {"num_register_tokens": 2}),
}
PROCESSOR = {"size": 16, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}


def reference(family: str):
    """Transformers' PyTorch model with random weights."""
    name, fields = FAMILIES[family]
    cls = getattr(transformers, name)
    return randomize(cls(cls.config_class(**SIZES, **fields)))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A ViT of Transformers, saved as it saves it with its processor; and where."""
    model = reference("vit")
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return model, folder


def ours(folder, **options):
    return FlaxAutoModelForImageClassification.from_pretrained(
        folder, precision="highest", **options
    )


@pytest.fixture(scope="module")
def exported(theirs, tmp_path_factory):
    """The ViT exported for any number of images, and not checked."""
    path = tmp_path_factory.mktemp("exported") / "model.jaxexport"
    processor = ViTImageProcessor.from_pretrained(theirs[1])
    export(ours(theirs[1]), path, image_processor=processor, check=False)
    return path


@pytest.fixture(scope="module")
def loaded(exported):
    return load(exported)


def pixels(batch=2, size=(16, 16), seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 3, *size)).astype(np.float32)


def logits_of(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).logits.numpy()


def close(found, wanted, bound="reference float32"):
    error = np.abs(np.asarray(found) - np.asarray(wanted)).max()
    assert error <= BOUNDS[bound] * max(1.0, np.abs(wanted).max()), error


def pictures(count=3):
    rng = np.random.default_rng(5)
    return [
        PIL.Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)) for i in range(count)
    ]


def rewritten(source: Path, target: Path, **members: bytes) -> Path:
    """A copy of an export with other members: names with `_` for the dot."""
    others = {name.replace("__", "."): data for name, data in members.items()}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, others.get(name, old.read(name)))
    return target


def metadata_with(source: Path, **fields) -> bytes:
    with zipfile.ZipFile(source) as archive:
        return json.dumps({**json.loads(archive.read("metadata.json")), **fields}).encode()


# -- what the programs give


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    model = reference(family)
    model.save_pretrained(tmp_path / "theirs")
    export(ours(tmp_path / "theirs"), tmp_path / "m.jaxexport", check=False)
    program = load(tmp_path / "m.jaxexport")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.batch == "dynamic"
    assert program.labels == LABELS
    assert program.config["model_type"] == model.config.model_type
    x = pixels(3)
    found = program(x)
    assert (found.shape, found.dtype) == ((3, 5), np.float32)
    close(found, logits_of(model, x))


def test_any_number_of_images(theirs, loaded):
    for count in (1, 3, 8):
        x = pixels(count)
        close(loaded(x), logits_of(theirs[0], x))


@pytest.mark.slow
def test_the_flax_model_of_transformers(theirs, loaded):
    model = transformers.FlaxViTForImageClassification.from_pretrained(theirs[1], from_pt=True)
    x = pixels(3)
    close(loaded(x), model(x).logits, "flax reference")


def test_a_fixed_number_of_images(theirs, tmp_path):
    export(ours(theirs[1]), tmp_path / "m.jaxexport", batch=2, platforms=["cpu"], check=False)
    program = load(tmp_path / "m.jaxexport")
    assert program.batch == 2
    x = pixels(2)
    close(program(x), logits_of(theirs[0], x))
    with pytest.raises(InputError, match=r"of shape \(2, 3, 16, 16\).*given float32 of shape \(3,"):
        program(pixels(3))
    # More and fewer pictures than that are cut and padded.
    many = program.classify(pictures(3), top_k=1)
    assert many == [program.classify(picture, top_k=1) for picture in pictures(3)]


def test_classify_prepares_and_names(theirs, loaded, tmp_path):
    model, folder = theirs
    images = pictures()
    inputs = transformers.ViTImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits.softmax(-1).numpy()
    images[0].save(tmp_path / "one.png")
    for given in (images, [tmp_path / "one.png", np.asarray(images[1]), images[2]]):
        results = loaded.classify(given, top_k=9)
        for predictions, row in zip(results, wanted, strict=True):
            assert [p.index for p in predictions] == list(np.argsort(-row))
            assert [p.label for p in predictions] == [LABELS[p.index] for p in predictions]
            close([p.probability for p in predictions], np.sort(row)[::-1])
    alone = loaded.classify(images[0], top_k=2)
    assert [p.index for p in alone] == [p.index for p in loaded.classify(images, top_k=2)[0]]
    assert loaded.classify([]) == []


def test_classes_that_do_not_exclude_each_other(tmp_path):
    config = make_config(
        id2label=dict(enumerate(LABELS)),
        num_hidden_layers=1,
        problem_type="multi_label_classification",
    )
    model = flax_twin(FlaxViTForImageClassification, config, random_weights(config, "classifier"))
    export(model, tmp_path / "m.jaxexport", platforms=["cpu"], check=False)
    program = load(tmp_path / "m.jaxexport")
    picture = pictures(1)[0]
    wanted = torch.sigmoid(torch.tensor(np.asarray(program(program.prepare(picture)[None]))[0]))
    found = sorted(program.classify(picture), key=lambda p: p.index)
    np.testing.assert_allclose([p.probability for p in found], wanted, rtol=1e-6)


def test_pixels_of_8_bits_are_normalised_inside(theirs, tmp_path):
    model, folder = theirs
    processor = ViTImageProcessor.from_pretrained(folder)
    export(
        ours(folder),
        tmp_path / "m.jaxexport",
        image_processor=processor,
        input_dtype="uint8",
        platforms=["cpu"],
        check=False,
    )
    program = load(tmp_path / "m.jaxexport")
    images = pictures()
    inputs = transformers.ViTImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits.numpy()
    raw = np.stack([program.prepare(image) for image in images])
    assert raw.dtype == np.uint8
    close(program(raw), wanted)
    with pytest.raises(InputError, match=r"must be uint8 .*given float32"):
        program(raw.astype(np.float32))
    with pytest.raises(ImageError, match="takes pixels of 8 bits; given an array of float"):
        program.classify(np.zeros((16, 16, 3), np.float32) + 0.5)


def test_the_size_of_images_is_the_processors_where_the_family_takes_any(tmp_path):
    model = reference("dinov2")
    model.save_pretrained(tmp_path / "theirs")
    processor = ViTImageProcessor(size={"height": 24, "width": 20})
    path = tmp_path / "m.jaxexport"
    export(ours(tmp_path / "theirs"), path, image_processor=processor, check=False)
    program = load(path)
    assert program.input_shape == (3, 24, 20)
    x = pixels(2, (24, 20))
    close(program(x), logits_of(model, x))


def test_features_of_a_network_without_a_classifier(theirs, tmp_path):
    model = theirs[0]
    model.vit.save_pretrained(tmp_path / "base")
    base = FlaxAutoModel.from_pretrained(
        tmp_path / "base", add_pooling_layer=False, precision="highest"
    )
    export(base, tmp_path / "m.jaxexport", output="features", check=False)
    program = load(tmp_path / "m.jaxexport")
    x = pixels(2)
    with torch.no_grad():
        wanted = model.vit(torch.from_numpy(x)).last_hidden_state[:, 0].numpy()
    close(program(x), wanted)
    assert program.labels == []
    with pytest.raises(InputError, match="gives features, not logits, so it cannot classify"):
        program.classify(pictures(1))


def test_features_beside_a_pooler_of_the_patches(tmp_path):
    """BEiT's looks at every patch, of which the features are not made."""
    reference("beit").beit.save_pretrained(tmp_path / "base")
    base = FlaxAutoModel.from_pretrained(tmp_path / "base", precision="highest")
    assert base.module.add_pooling_layer
    export(base, tmp_path / "m.jaxexport", output="features", check=False)
    theirs = transformers.BeitModel.from_pretrained(tmp_path / "base").eval()
    x = pixels(2)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(x)).last_hidden_state[:, 0].numpy()
    close(load(tmp_path / "m.jaxexport")(x), wanted)


@pytest.mark.slow
def test_half_precision_is_computed_and_logits_are_float32(theirs, tmp_path):
    model = ours(theirs[1], dtype="bfloat16", param_dtype="bfloat16")
    export(model, tmp_path / "m.jaxexport", platforms=["cpu"], check=False)
    program = load(tmp_path / "m.jaxexport")
    assert {str(array.dtype) for array in program.parameters.values()} == {"bfloat16"}
    assert program.metadata["dtype"] == "bfloat16"
    x = pixels(2)
    found = program(x)
    assert found.dtype == np.float32
    # 0.0125 of the largest logit: three significant bits less than bfloat16 has.
    wanted = logits_of(theirs[0], x)
    assert np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max()
    assert np.abs(found - np.asarray(model(x).logits, np.float32)).max() <= 0.01


# -- the file


def test_the_same_model_gives_the_same_file_without_paths_of_this_machine(exported, theirs):
    again = exported.with_name("again.jaxexport")
    processor = ViTImageProcessor.from_pretrained(theirs[1])
    export(ours(theirs[1]), again, image_processor=processor, check=False)
    data = again.read_bytes()
    assert data == exported.read_bytes()
    for path in (ROOT, Path(jax.__file__).parents[1], theirs[1]):
        assert str(path).encode() not in data


def test_what_is_inside(exported, theirs):
    with zipfile.ZipFile(exported) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        metadata = json.loads(archive.read("metadata.json"))
        processor = json.loads(archive.read("preprocessor_config.json"))
        config = json.loads(archive.read("config.json"))
        parameters = archive.read("parameters.safetensors")
        program = archive.read("program.bin")
    assert sorted(names) == [
        "config.json",
        "metadata.json",
        "parameters.safetensors",
        "preprocessor_config.json",
        "program.bin",
    ]
    assert metadata["labels"] == LABELS
    assert metadata["input_shape"] == [3, 16, 16]
    assert metadata["versions"]["jax"] == jax.__version__
    assert (processor["image_mean"], processor["resample"]) == ([0.4, 0.5, 0.6], 3)
    assert config["hidden_size"] == 24
    # The weights are there once, and none in the program.
    count = sum(p.numel() for p in theirs[0].parameters())
    assert 4 * count < len(parameters) < 4 * count + 10_000
    assert len(program) < 60_000
    restored = jax.export.deserialize(bytearray(program))
    assert restored.platforms == ("cpu", "cuda", "tpu")
    assert str(restored.in_avals[-1].shape) == "(b, 3, 16, 16)"


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_program_for_another_platform_is_made_here_and_refused_here(platform, theirs, tmp_path):
    path = tmp_path / "m.jaxexport"
    export(ours(theirs[1]), path, platforms=[platform], check=False)
    with pytest.raises(
        InputError,
        match=rf"m.jaxexport: was exported for {platform}; this would run on cpu. Export it again "
        rf"with --platforms {platform},cpu, or run it where JAX has {platform}\.",
    ):
        load(path)


@pytest.mark.slow
def test_checked_in_a_fresh_process(theirs, tmp_path):
    model, folder = theirs
    processor = ViTImageProcessor.from_pretrained(folder)
    path = tmp_path / "m.jaxexport"
    seen = []

    def answers(x):
        seen.append(x)
        return logits_of(model, x)

    report = export(ours(folder), path, image_processor=processor, references={"PyTorch": answers})
    program = load(path)
    assert program.check == report.check
    assert program.check["images"] == 3
    assert program.check["platform"] == "cpu"
    wanted = answers(seen[0])
    errors = program.check["max_abs_error"]
    close(errors["Flax"], 0.0)
    # Both processes run the same program on the same machine.
    assert errors["PyTorch"] == np.abs(np.asarray(program(seen[0])) - wanted).max() > 0
    assert program.check["largest"] == pytest.approx(np.abs(wanted).max(), rel=1e-5)
    assert report.bytes == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.jaxexport"]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("numpy.save(sys.argv[3], numpy.load(sys.argv[2])[:, 0, 0, :5] + 100)", "differs from the"),
        ("numpy.save(sys.argv[3], numpy.zeros((2, 5), numpy.float32))", r"of shape \(2, 5\), Flax"),
        ("raise OSError('no such thing')", "in a fresh process.*OSError: no such thing"),
    ],
)
def test_a_check_that_fails_leaves_nothing(program, said, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(vit_flax.export, "_LOADER", f"import sys, numpy\n{program}")
    path = tmp_path / "m.jaxexport"
    path.write_bytes(b"before")
    with pytest.raises(CheckpointError, match=said) as caught:
        export(ours(theirs[1]), path, force=True)
    assert "nothing was written" in str(caught.value)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.jaxexport"]


def test_weights_that_are_not_finite_fail_the_check(theirs, tmp_path, monkeypatch):
    loader = "import sys, numpy\nnumpy.save(sys.argv[3], numpy.full((3, 5), numpy.nan))"
    monkeypatch.setattr(vit_flax.export, "_LOADER", loader)
    model = ours(theirs[1])
    model.params = jax.tree.map(lambda x: x * np.float32("nan"), model.params)
    with pytest.raises(CheckpointError, match=r"output of the model \(Flax\) is not finite"):
        export(model, tmp_path / "m.jaxexport")


def test_what_a_check_compares():
    """Each side is told apart, and in float32 every reference counts."""
    ones, bad = np.ones((1, 2), np.float32), np.array([[1.0, np.nan]], np.float32)
    with pytest.raises(CheckpointError, match=r"program differs from the model \(Flax\) by nan"):
        measure(bad, {"Flax": ones}, "float32")
    with pytest.raises(CheckpointError, match=r"output of the model \(PyTorch\) is not finite"):
        measure(ones, {"Flax": ones, "PyTorch": bad}, "float32")
    references = {"Flax": ones, "PyTorch": ones + np.float32(0.02)}
    with pytest.raises(CheckpointError, match=r"differs from the model \(PyTorch\) by 0\.02, and"):
        measure(ones, references, "float32")
    found = measure(ones, references, "bfloat16")["max_abs_error"]
    assert found == {"Flax": 0.0, "PyTorch": pytest.approx(0.02, rel=1e-5)}


# -- files that are wrong


def test_files_that_are_cut_short(exported, tmp_path):
    data = exported.read_bytes()
    path = tmp_path / "m.jaxexport"
    for length in (0, 1, 30, 500, 5000, len(data) // 2, len(data) - 30, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"m.jaxexport: not an exported model, or trunc"):
            load(path)


def test_bytes_that_are_changed(exported, loaded, tmp_path):
    data = bytearray(exported.read_bytes())
    path, said = tmp_path / "m.jaxexport", list[str]()
    wanted = {name: np.asarray(array) for name, array in loaded.parameters.items()}
    places = np.random.default_rng(0).integers(0, len(data), 60)
    # The zip's directory, at the end, has the sizes and the checksums.
    for place in (*places.tolist(), *range(len(data) - 400, len(data), 11)):
        changed = bytearray(data)
        changed[place] ^= 0x55
        path.write_bytes(changed)
        try:
            found = load(path)
        except CheckpointError as error:
            said.append(str(error))
            continue
        # A date or a permission, which nothing depends on.
        for name, array in wanted.items():
            np.testing.assert_array_equal(found.parameters[name], array)
        assert found.metadata == loaded.metadata
    assert len(said) >= 60
    assert all(str(path) in text and "\n" not in text for text in said)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"calling_convention_version": 99}, r"calling convention 99, and this JAX reads \d+ to"),
        ({"calling_convention_version": 1}, "Install that version of JAX, or export it again"),
        ({"version": 7}, "is of version 7 of this kind of file; this package reads version 1"),
        ({"kind": "other"}, "not an exported model"),
        ({"labels": "cat"}, "corrupt: metadata.json has no proper 'labels'"),
        ({"input_shape": [3, 16]}, "corrupt: metadata.json has no proper 'input_shape'"),
        ({"input_dtype": "int4"}, "corrupt: metadata.json has no proper 'input_dtype'"),
        ({"batch": None}, "corrupt: metadata.json has no proper 'batch'"),
        ({"batch": True}, "corrupt: metadata.json has no proper 'batch'"),
        ({"batch": -1}, "corrupt: metadata.json has no proper 'batch'"),
        ({"labels": [1, 2, 3, 4, 5]}, "corrupt: metadata.json has no proper 'labels'"),
        ({"labels": ["cat"]}, "corrupt: its program and metadata.json do not fit each other"),
        ({"input_dtype": "uint8"}, "corrupt: its program and metadata.json do not fit each other"),
        ({"input_shape": [3, 8, 8]}, "its program and metadata.json do not fit each other"),
        ({"input_shape": [True] * 3}, "corrupt: metadata.json has no proper 'input_shape'"),
        ({"platforms": [1, 2]}, "corrupt: metadata.json has no proper 'platforms'"),
        ({"output": ["logits"]}, "corrupt: metadata.json has no proper 'output'"),
        ({"calling_convention_version": 9.5}, "has no proper 'calling_convention_version'"),
    ],
)
def test_metadata_that_does_not_fit(members, said, exported, tmp_path):
    data = metadata_with(exported, **members)
    path = rewritten(exported, tmp_path / "m.jaxexport", metadata__json=data)
    with pytest.raises(CheckpointError, match=said):
        load(path)


def test_members_that_are_something_else(exported, tmp_path):
    path = tmp_path / "m.jaxexport"
    said = rf"its program cannot be read \(.*\); it was exported with JAX {jax.__version__}"
    for program in (b"", b"nonsense" * 50):
        with pytest.raises(CheckpointError, match=said):
            load(rewritten(exported, path, program__bin=program))
    table = b'{"image_processor_type": "LevitImageProcessor"}'
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json.*LevitImageProcessor"):
        load(rewritten(exported, path, preprocessor_config__json=table))
    with pytest.raises(CheckpointError, match=r"not valid metadata.json"):
        load(rewritten(exported, path, metadata__json=b"{"))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(rewritten(exported, path, parameters__safetensors=b"x" * 99))


def test_parameters_of_another_network(exported, tmp_path):
    config = make_config(num_hidden_layers=1)
    model = flax_twin(FlaxViTForImageClassification, config, random_weights(config, "classifier"))
    export(model, tmp_path / "other.jaxexport", platforms=["cpu"], check=False)
    with zipfile.ZipFile(tmp_path / "other.jaxexport") as archive:
        parameters = archive.read("parameters.safetensors")
    path = rewritten(exported, tmp_path / "m.jaxexport", parameters__safetensors=parameters)
    with pytest.raises(CheckpointError, match="its program and its parameters do not fit each"):
        load(path)


def test_other_files(exported, tmp_path):
    with pytest.raises(MissingFileError, match=r"nothing.jaxexport: cannot be read"):
        load(tmp_path / "nothing.jaxexport")
    with pytest.raises(MissingFileError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="A checkpoint is loaded with `from_pretrained`"):
        load(DIGITS / "model.safetensors")
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match="not an exported model"):
        load(tmp_path / "weights.npz")
    path = tmp_path / "packed.jaxexport"
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="must be stored without compression"):
        load(path)


# -- calls that are wrong


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (pixels(2).transpose(0, 2, 3, 1), r"\(any number, 3, 16, 16\).*of shape \(2, 16, 16, 3\)"),
        (pixels(2)[0], r"Add a batch dimension: `pixel_values\[None\]`"),
        (pixels(2)[:0], r"of shape \(0, 3, 16, 16\)"),
        (pixels(2).astype(np.float64), "given float64 .*Convert it: `.astype"),
        (pixels(2, (16, 20)), r"of shape \(2, 3, 16, 20\)"),
        ([[1.0, 2.0]], r"given float64 of shape \(1, 2\)"),
    ],
)
def test_pixel_values_that_do_not_fit(x, said, loaded):
    with pytest.raises(InputError, match=said) as caught:
        loaded(x)
    assert str(loaded.path) in str(caught.value)


def test_images_that_do_not_fit(loaded, tmp_path):
    for top_k in (0, True, 1.5):
        with pytest.raises(InputError, match="`top_k` must be a positive integer"):
            loaded.classify(pictures(1), top_k=top_k)
    (tmp_path / "bad.png").write_text("nothing")
    with pytest.raises(ImageError, match=r"bad.png: not an image"):
        loaded.classify([tmp_path / "bad.png"])
    with pytest.raises(MissingFileError, match=r"none.png"):
        loaded.classify(tmp_path / "none.png")


def test_options_that_are_wrong(theirs, tmp_path):
    model, path = ours(theirs[1]), tmp_path / "m.jaxexport"
    for batch in (0, -1, True, 2.0, "many"):
        with pytest.raises(InputError, match="`batch` must be a positive integer or 'dynamic'"):
            export(model, path, batch=batch)
    with pytest.raises(InputError, match=r"some of cpu, cuda, rocm, tpu; given 'gpu'. A GPU"):
        export(model, path, platforms=["cpu", "gpu"])
    with pytest.raises(InputError, match=r"`platforms` must be some of .*given none"):
        export(model, path, platforms=[])
    with pytest.raises(InputError, match="`input_dtype` must be 'float32' or 'uint8'"):
        export(model, path, input_dtype="int8")
    with pytest.raises(InputError, match="`output` must be 'logits' or 'features'"):
        export(model, path, output="loss")
    with pytest.raises(InputError, match="'features' is for a base network"):
        export(model, path, output="features")
    with pytest.raises(InputError, match="nothing here can run a program for tpu to check it"):
        export(model, path, platforms=["tpu"])
    with pytest.raises(ConfigError, match="contradict each other"):
        export(model, path, image_processor=ViTImageProcessor(size=20))
    decoder = FlaxViTForMaskedImageModeling(make_config(num_hidden_layers=0))
    with pytest.raises(InputError, match="MaskedImageModeling has no classifier"):
        export(decoder, path)
    with pytest.raises(MissingFileError, match="wanted the name of a file"):
        export(model, tmp_path)
    with pytest.raises(MissingFileError, match="no such directory"):
        export(model, tmp_path / "none" / "m.jaxexport")
    assert list(tmp_path.iterdir()) == []


def test_without_what_programs_are_read_with(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(InputError, match=r"flatbuffers, .*run: pip install flatb"):
        load(exported)


# -- ONNX


def run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": x})[0]


def onnx_metadata(path) -> dict[str, str]:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize(
    "family",
    [
        "vit",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "vit"),
    ],
)
def test_onnx_of_every_family_at_any_number_of_images(family, tmp_path):
    model = reference(family)
    model.save_pretrained(tmp_path / "theirs")
    twin = AutoModelForImageClassification.from_pretrained(tmp_path / "theirs").train()
    path = tmp_path / "m.onnx"
    report = vit_torch.export.export(twin, path, image_processor=ViTImageProcessor(**PROCESSOR))
    assert twin.training
    for count in (1, 3, 8):
        x = pixels(count)
        close(run_onnx(path, x), logits_of(model, x))
    found = onnx_metadata(path)
    assert json.loads(found["labels"]) == LABELS
    assert json.loads(found["input_shape"]) == [3, 16, 16]
    assert json.loads(found["preprocessing"])["image_std"] == [0.2, 0.3, 0.4]
    assert json.loads(found["config"])["hidden_size"] == 24
    check = json.loads(found["check"])
    assert check == report.check
    assert check["images"] == 3
    close(check["max_abs_error"]["PyTorch"], 0.0)
    assert str(ROOT).encode() not in path.read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["m.onnx", "theirs"]


@pytest.mark.slow
def test_onnx_of_a_fixed_number_of_images_and_of_features(theirs, tmp_path):
    model = theirs[0]
    model.vit.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    vit_torch.export.export(base, tmp_path / "m.onnx", batch=2, output="features", check=False)
    x = pixels(2)
    with torch.no_grad():
        wanted = model.vit(torch.from_numpy(x)).last_hidden_state[:, 0].numpy()
    close(run_onnx(tmp_path / "m.onnx", x), wanted)
    assert "check" not in onnx_metadata(tmp_path / "m.onnx")
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        run_onnx(tmp_path / "m.onnx", pixels(3))


def test_onnx_refuses(theirs, tmp_path, monkeypatch):
    twin = ViTForImageClassification.from_pretrained(theirs[1])
    path = tmp_path / "m.onnx"
    with pytest.raises(InputError, match="written in float32; given a model of bfloat16"):
        vit_torch.export.export(twin.to(torch.bfloat16), path)
    twin = twin.float()
    with pytest.raises(InputError, match="`batch` must be a positive integer"):
        vit_torch.export.export(twin, path, batch=0)
    monkeypatch.setattr(vit_torch.export, "_LARGEST", 1000)
    with pytest.raises(InputError, match="one ONNX file holds 2 GB; the weights take"):
        vit_torch.export.export(twin, path)
    found = vit_torch.export.importlib.util.find_spec
    missing = {"onnxruntime"}
    monkeypatch.setattr(
        vit_torch.export.importlib.util,
        "find_spec",
        lambda name: None if name in missing else found(name),
    )
    with pytest.raises(InputError, match="pip install onnxruntime; or pass --no-check"):
        vit_torch.export.export(twin, path)
    vit_torch.export.require(check=False)
    missing |= {"onnx", "onnxscript"}
    with pytest.raises(InputError, match=r"onnx and onnxscript.*pip install onnx onnxscript\."):
        vit_torch.export.export(twin, path, check=False)
    assert list(tmp_path.iterdir()) == []


# -- the command


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `vit export ...` here: exit code, standard output, standard error."""
    monkeypatch.delenv("VIT_DEBUG", raising=False)

    def call(*arguments):
        code = main(["export", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "unexpected" not in err
        return code, out, err

    return call


def test_the_command(theirs, tmp_path, command):
    model, folder = theirs
    path = tmp_path / "m.jaxexport"
    code, out, err = command(folder, path)
    assert (code, err) == (0, "")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert lines["model"] == f"{folder} (vit, float32)"
    assert lines["program"] == "StableHLO for cpu, cuda, tpu"
    assert lines["takes"].startswith("pixel_values: any number of images, 3 x 16 x 16 (channels")
    assert lines["gives"] == "logits of 5 classes"
    assert lines["wrote"].startswith(f"{path}: 0.")
    said = re.fullmatch(
        r"loaded in a fresh process, cpu, 3 images: largest difference (\S+) \(Flax\), (\S+) "
        r"\(PyTorch\)",
        lines["check"],
    )
    assert said
    program = load(path)
    errors = program.check["max_abs_error"]
    assert [f"{errors[name]:.2g}" for name in ("Flax", "PyTorch")] == [*said.groups()]
    x = pixels(2)
    close(program(x), logits_of(model, x))


def test_the_command_as_json_with_other_options(theirs, tmp_path, command):
    arguments = (theirs[1], tmp_path / "m.zip", "--to", "jax", "--platforms", "cpu,rocm")
    more = ("--batch", "4", "--input", "uint8", "--dtype", "bfloat16", "--no-check", "--json")
    code, out, err = command(*arguments, *more)
    assert (code, err) == (0, "")
    table = json.loads(out)
    assert table["path"] == str(tmp_path / "m.zip")
    assert table["bytes"] == (tmp_path / "m.zip").stat().st_size
    assert table["check"] is None
    wanted = {
        "platforms": ["cpu", "rocm"],
        "batch": 4,
        "input_dtype": "uint8",
        "dtype": "bfloat16",
        "num_labels": 5,
    }
    assert {name: table["metadata"][name] for name in wanted} == wanted
    code, _, err = command(*arguments)
    assert code == 2
    assert err == (
        f"vit: error: {tmp_path / 'm.zip'}: already there; nothing was written. Pass --force (in "
        "Python `force=True`) to overwrite.\n"
    )
    code, out, err = command(*arguments, "--no-check", "--force")
    assert (code, err) == (0, "")
    assert "none: --no-check was given" in out


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_command_for_features(tmp_path, command):
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=36))
    randomize(model).save_pretrained(tmp_path / "base")
    code, _, err = command(tmp_path / "base", tmp_path / "m.jaxexport")
    assert code == 2
    assert "these weights have no classifier, so there are no logits" in err
    assert "Pass --output features" in err
    options = ("--output", "features", "--no-check", "--platforms", "cpu")
    code, out, err = command(tmp_path / "base", tmp_path / "m.jaxexport", *options)
    assert code == 0
    assert err.count("\n") == 1  # that there is no preprocessor_config.json
    assert "gives       features\n" in out
    x = pixels(2)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x)).last_hidden_state[:, 0].numpy()
    close(load(tmp_path / "m.jaxexport")(x), wanted)


def test_the_command_for_onnx(theirs, tmp_path, command, monkeypatch):
    exported = []

    def record(model, path, **options):
        exported.append((model, path, options))
        raise InputError("far enough")

    monkeypatch.setattr(vit_torch.export, "export", record)
    code, _, err = command(theirs[1], tmp_path / "m.onnx", "--batch", "2")
    assert (code, err) == (2, "vit: error: far enough\n")
    (model, path, options) = exported[0]
    assert type(model) is ViTForImageClassification
    assert path == tmp_path / "m.onnx"
    assert options.pop("image_processor").image_mean == [0.4, 0.5, 0.6]
    assert options == {"batch": 2, "output": "logits", "check": True, "force": False}


@pytest.mark.slow
def test_the_command_writes_onnx(theirs, tmp_path, command):
    code, out, err = command(theirs[1], tmp_path / "m.onnx")
    assert (code, err) == (0, "")
    assert re.search(r"^program +ONNX, opset \d+$", out, re.M)
    assert re.search(r"^check +onnxruntime \S+, 3 images: largest difference \S+ \(Py", out, re.M)
    x = pixels(3)
    close(run_onnx(tmp_path / "m.onnx", x), logits_of(theirs[0], x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m.jaxexport", "--platforms", "cpu,gpu"], "must be some of cpu, cuda, rocm, tpu, with"),
        (["m.jaxexport", "--batch", "0"], "must be a positive integer or dynamic; given '0'"),
        (["m.jaxexport", "--batch", "all"], "must be a positive integer or dynamic; given 'all'"),
        (["m.jaxexport", "--platforms", "tpu"], "nothing here can run a program for tpu to check"),
        (["m.bin"], "the suffix says what to write, .jaxexport (JAX) or .onnx (ONNX); given .bin"),
        (["m"], "given none. Choose one of these, or pass --to"),
        (["m.onnx", "--platforms", "cpu"], "--platforms: for JAX programs"),
        (
            ["m.onnx", "--dtype", "bfloat16", "--input", "uint8"],
            "--input, --dtype: for JAX programs",
        ),
        (["none/m.jaxexport"], "none: no such directory"),
        (["."], "wanted the name of a file"),
        ([], "wanted MODEL and OUT"),
    ],
)
def test_the_command_refuses(arguments, said, theirs, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments == ["."]:
        arguments = [".", "--to", "jax"]
    code, out, err = command(theirs[1], *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_leaves_nothing(theirs, tmp_path, command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vit_flax.export, "_run_afresh", interrupted)
    code, out, err = command(theirs[1], tmp_path / "m.jaxexport")
    assert (code, out, err) == (130, "", "vit: interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(theirs, tmp_path, command, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vit_flax.export, "_write", full)
    path = tmp_path / "m.jaxexport"
    path.write_bytes(b"before")
    code, _, err = command(theirs[1], path, "--force", "--no-check")
    assert code == 2
    assert err == f"vit: error: {path}: cannot be written (No space left on device).\n"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.jaxexport": b"before"}


def test_the_command_without_a_package(theirs, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    code, _, err = command(theirs[1], tmp_path / "m.jaxexport")
    assert code == 2
    assert "run: pip install flatbuffers" in err


# -- the documentation


def snippets() -> dict[str, str]:
    """The blocks of Python in docs/export.md, by the heading they are under."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    return {
        heading: "\n".join(re.findall(r"```python\n(.*?)```", body, re.S))
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def run_alone(code: str, folder: Path, without: list[str]) -> str:
    """What a program prints in a fresh interpreter that cannot import some packages."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n"
    found = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


OURS = ["vit_common", "vit_convert", "vit_flax", "vit_torch", "vit_cli"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with the digits network exported, and an image."""
    folder = tmp_path_factory.mktemp("digits")
    model = FlaxAutoModelForImageClassification.from_pretrained(DIGITS)
    processor = ViTImageProcessor.from_pretrained(DIGITS)
    export(model, folder / "digits.jaxexport", image_processor=processor, check=False)
    place = folder / "vit_common" / "digits" / "images"  # as the page has it
    place.mkdir(parents=True)
    (place / "digit-3-01.png").write_bytes((DIGITS / "images" / "digit-3-01.png").read_bytes())
    return folder


def test_loading_without_flax(digits):
    out = run_alone(snippets()["Loading it in Python"], digits, ["flax", "torch", "transformers"])
    assert re.fullmatch(r"3 0\.91\d+\n\(8, 10\)\n", out)


def test_loading_with_nothing_but_jax(digits):
    code = snippets()["Loading it with nothing but JAX"]
    assert len(code.splitlines()) <= 20
    out = run_alone(code, digits, [*OURS, "flax", "torch", "safetensors", "PIL"])
    assert re.fullmatch(r"\(3, 10\)\n", out)


@pytest.mark.slow
def test_running_onnx_with_nothing_but_onnxruntime(digits):
    twin = AutoModelForImageClassification.from_pretrained(DIGITS)
    processor = ViTImageProcessor.from_pretrained(DIGITS)
    vit_torch.export.export(twin, digits / "digits.onnx", image_processor=processor)
    code = snippets()["Running ONNX with nothing but onnxruntime"]
    vit_torch.export.write_program(digits / "digits.onnx")
    out = run_alone(code, digits, [*OURS, "flax", "torch", "jax", "onnx"])
    assert re.fullmatch(r"3 0\.91\d+\n\(1, 8, 8\)\n", out)


@pytest.mark.parametrize("output", ["logits", "features"])
def test_a_network_of_images_and_texts_is_refused_with_what_to_do(tmp_path, capsys, output):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 24
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )
    vit_torch.CLIPModel(config).save_pretrained(tmp_path / "clip")
    path = tmp_path / "m.jaxexport"
    assert main(["export", str(tmp_path / "clip"), str(path), "--output", output]) == 2
    assert "Save the image tower, with `CLIPVisionModel.from_pretrained`" in capsys.readouterr().err
    assert not path.exists()
