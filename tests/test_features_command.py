"""`vit features`: vectors in files, against Transformers, read back by numpy, safetensors and
pyarrow; whole whatever happens, and every image exactly once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from feature_files import read_features as read
from networks import randomize
from tolerances import BOUNDS

import vit_cli.runs.rows
from vit_cli.main import main
from vit_cli.runs.feature_file import FeatureFile
from vit_cli.runs.partial import PartialFile
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import CheckpointError, ExistingFileError, InputError, MissingFileError
from vit_flax.inference import ImageClassifier, ImageEncoder

ATOL = BOUNDS["reference float32"]
FAMILIES = {
    "vit": (transformers.ViTModel, transformers.ViTConfig, {"intermediate_size": 64}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {"mlp_ratio": 2}),
}
SUFFIXES = ("npz", "safetensors", "parquet")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A checkpoint without a classifier, images, and what Transformers makes of them."""
    cls, config_class, fields = FAMILIES[request.param]
    config = config_class(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=8,
        image_size=32,
        **fields,
    )
    config._attn_implementation = "eager"
    model = randomize(cls(config).eval())
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(5):
        pictures.append(PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)))
        pictures[-1].save(images / f"{i}.png")
    (images / "2broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with torch.no_grad():
        wanted = model(**processor(pictures, return_tensors="pt"), output_hidden_states=True)
    return folder, images, wanted


def run(family, target, *options):
    folder, images, _ = family
    fixed = ["--model", str(folder), "--output", str(target)]
    return main(["features", str(images), *fixed, *options])


def test_features_are_those_of_transformers(family, tmp_path, capsys):
    _, images, wanted = family
    target = tmp_path / "out.npz"
    assert run(family, target, "--batch-size", "2") == 1
    err = capsys.readouterr().err
    assert "wrote" in err
    assert "5 x 32 float32" in err
    features, files, failed, errors, made_with = read(target)
    assert features.dtype == np.float32
    expected = wanted.last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(features, expected, rtol=0, atol=ATOL)
    assert files == [str(images / f"{i}.png") for i in range(5)]
    assert failed == [str(images / "2broken.png")]
    assert "not an image" in errors[0]
    assert made_with["layers"] == [-1]
    assert made_with["pool"] == "cls"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_several_layers_and_all_tokens(family, tmp_path, capsys):
    *_, wanted = family
    hidden = [wanted.hidden_states[1], wanted.hidden_states[2], wanted.last_hidden_state]
    target = tmp_path / "out.npz"
    assert run(family, target, "--layers", "0,-2,-1", "--pool", "none") == 1
    expected = torch.stack(hidden, 1).numpy()
    np.testing.assert_allclose(read(target)[0], expected, rtol=0, atol=ATOL)
    options = ("--layers", "-3,-1", "--pool", "mean")
    assert run(family, target, *options, "--force") == 1
    exact = read(target)[0]
    expected = torch.stack([hidden[0][:, 1:].mean(1), hidden[2][:, 1:].mean(1)], 1).numpy()
    np.testing.assert_allclose(exact, expected, rtol=0, atol=ATOL)
    half = tmp_path / "half.npz"
    assert run(family, half, *options, "--store-dtype", "float16") == 1
    np.testing.assert_array_equal(read(half)[0], exact.astype(np.float16))
    capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 5, 7)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_holds_the_same(tmp_path, suffix, shape, dtype):
    target = tmp_path / f"out.{suffix}"
    rows = np.random.default_rng(0).normal(size=(30, *shape)).astype(np.float32)
    file = FeatureFile(str(target), dtype=dtype, run={"layers": [-1]})
    for i, row in enumerate(rows):
        if i % 10 == 3:
            file.fail(f"{i}.png", f"error {i}")
        else:
            file.write(f"{i}.png", row)
    file.write("0.png", rows[1])  # once is enough
    file.finish()
    features, files, failed, errors, made_with = read(target)
    good = [i for i in range(30) if i % 10 != 3]
    assert features.dtype == dtype
    np.testing.assert_array_equal(features, rows[good].astype(dtype))
    assert files == [f"{i}.png" for i in good]
    assert failed == ["3.png", "13.png", "23.png"]
    assert errors == ["error 3", "error 13", "error 23"]
    assert made_with == {"layers": [-1]}
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_model_with_a_classifier_gives_the_same(tmp_path, capsys):
    digits = embedded_checkpoint()
    target = tmp_path / "out.npz"
    assert main(["features", str(digits / "images"), "--output", str(target)]) == 0
    features, files, *_ = read(target)
    classify = ImageClassifier.from_pretrained(digits)
    np.testing.assert_allclose(features, classify.features(files), rtol=0, atol=ATOL)
    capsys.readouterr()


def test_an_encoder_needs_no_classifier(family):
    folder, images, wanted = family
    encode = ImageEncoder.from_pretrained(folder)
    picture = images / "3.png"
    expected = wanted.last_hidden_state[3].numpy()
    np.testing.assert_allclose(encode.features(picture, pool=None), expected, rtol=0, atol=ATOL)
    S = expected.shape[0]
    assert encode.attention(picture, layers=[0, 2]).shape == (2, 4, S, S)
    assert encode.seen(picture).size == (32, 32)
    before = encode.compilations
    list(encode.stream_features([picture] * 5, pool=None, batch_size=1))
    assert encode.compilations == before
    with pytest.raises(CheckpointError, match="no classifier"):
        ImageClassifier.from_pretrained(folder)


def test_a_head_that_nothing_runs_is_left_aside(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        patch_size=8,
        image_size=32,
        encoder_stride=8,
    )
    model = randomize(transformers.ViTForMaskedImageModeling(config).eval())
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    picture = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    )
    with torch.no_grad():
        wanted = model.vit(**processor(picture, return_tensors="pt")).last_hidden_state
    found = ImageEncoder.from_pretrained(tmp_path).features(picture, pool=None)
    np.testing.assert_allclose(found, wanted[0].numpy(), rtol=0, atol=ATOL)


# -- runs that do not end


def vectors(count, width=3):
    """Names and vectors that tell which is which."""
    return [(f"{i}.png", np.full(width, i, np.float32)) for i in range(count)]


def check(path, count, failed=()):
    features, files, bad, *_ = read(path)
    assert bad == list(failed)
    assert files == [f"{i}.png" for i in range(count) if f"{i}.png" not in failed]
    np.testing.assert_array_equal(features[:, 0], [int(name.partition(".")[0]) for name in files])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("names", "rows"), [(0, 0), (-3, 0), (0, -5), (-40, 0), (0, -30), (4, 0), (0, 7), (-9999, 0)]
)
def test_what_a_killed_run_leaves(tmp_path, suffix, names, rows):
    """Bytes cut off or added at the end of either file: no half row, nothing twice."""
    target = tmp_path / f"out.{suffix}"
    file = FeatureFile(str(target))
    for name, row in vectors(3):
        file.write(name, row)
    file.fail("3.png", "broken")
    file.write(*vectors(5)[4])
    file.flush()
    file.close()
    for path, change in ((f"{target}.partial", names), (f"{target}.partial.rows", rows)):
        size = os.path.getsize(path)
        with open(path, "ab") as stream:
            if change > 0:
                stream.write(b'{"fi rows'[:change])
            else:
                stream.truncate(max(0, size + change))
    file = FeatureFile(str(target), resume=True)
    whole = names >= 0 and rows >= 0
    assert ("4.png" in file.done) == whole
    for name, row in vectors(7):
        if name == "3.png":
            file.fail(name, "broken")
        else:
            file.write(name, row)
    file.finish()
    check(target, 7, ["3.png"])


def test_a_process_that_is_killed(tmp_path):
    target = tmp_path / "out.npz"
    script = (
        "import os, signal, sys, numpy as np\n"
        "from vit_cli.runs.feature_file import FeatureFile\n"
        "file = FeatureFile(sys.argv[1])\n"
        "for i in range(4321):\n"
        "    file.write(f'{i}.png', np.full(100, i, np.float32))\n"
        "    if i % 1000 == 0: file.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ExistingFileError, match="pass --resume to go on"):
        FeatureFile(str(target))
    file = FeatureFile(str(target), resume=True)
    assert 4000 < file.count <= 4321
    assert len(file.done) == file.count
    for name, row in vectors(5000, 100):
        file.write(name, row)
    file.finish()
    check(target, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_can_be_resumed(tmp_path, number, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        noise = rng.integers(0, 256, (900, 900), np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i:04d}.png", compress_level=1)
    target = tmp_path / "out.npz"
    options = ["features", str(folder), "--output", str(target), "--batch-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_cli", *options], stderr=subprocess.PIPE, text=True
    )
    rows = tmp_path / "out.npz.partial.rows"
    while not (rows.exists() and rows.stat().st_size > 2000):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not target.exists()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "--resume goes on from there" in err
    assert main([*options, "--resume"]) == 0
    assert "images are done already" in capsys.readouterr().err
    features, files, *_ = read(target)
    assert files == sorted(map(str, folder.iterdir()))
    whole = tmp_path / "whole.npz"
    assert main(["features", str(folder), "--output", str(whole)]) == 0
    np.testing.assert_allclose(features, read(whole)[0], rtol=0, atol=ATOL)


def test_resume_goes_on_with_the_same_settings(family, tmp_path, capsys):
    target = tmp_path / "out.npz"
    folder, images, wanted = family
    assert run(family, target, "--layers", "7") == 2
    assert "blocks from 0 to 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    settings = {
        "model": str(folder),
        "revision": None,
        "subfolder": None,
        "layers": [-1],
        "pool": "cls",
        "dtype": "float32",
        "store_dtype": "float32",
    }
    file = FeatureFile(str(target), run=settings)
    for i in (0, 1):
        file.write(str(images / f"{i}.png"), np.full(32, i, np.float32))
    file.flush()
    file.close()
    assert run(family, target) == 2
    assert "pass --resume to go on" in capsys.readouterr().err
    for option, said in (
        (["--pool", "mean"], "pool 'cls', now 'mean'"),
        (["--weights", "int8"], "weights not given, now 'int8'"),
        (["--store-dtype", "float16"], "store_dtype 'float32', now 'float16'"),
    ):
        assert run(family, target, "--resume", *option) == 2
        err = capsys.readouterr().err
        assert f"made with {said}. Run it as it was" in err
        assert len(err.splitlines()) == 1
    assert run(family, target, "--resume") == 1
    assert "2 of 6 images are done already" in capsys.readouterr().err
    features, files, *_ = read(target)
    assert files == [str(images / f"{i}.png") for i in range(5)]
    np.testing.assert_array_equal(features[:2, 0], [0, 1])  # what was done stays
    expected = wanted.last_hidden_state[2:, 0].numpy()
    np.testing.assert_allclose(features[2:], expected, rtol=0, atol=ATOL)
    assert run(family, target, "--resume") == 2
    assert "already there, and whole; pass --force" in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no locks of files")
    file = FeatureFile(str(tmp_path / "out.npz"))
    file.write(*vectors(1)[0])
    for option in ("resume", "force"):
        with pytest.raises(MissingFileError, match="another process is writing this"):
            FeatureFile(str(tmp_path / "out.npz"), **{option: True})
    file.finish()
    check(tmp_path / "out.npz", 1)


@pytest.mark.parametrize("option", ["resume", "force"])
def test_nobody_else_begins_while_the_file_is_made(tmp_path, monkeypatch, option):
    pytest.importorskip("fcntl", reason="this system has no locks of files")
    target = tmp_path / "out.npz"
    file = FeatureFile(str(target))
    file.write(*vectors(1)[0])
    replace, discard = vit_cli.runs.rows.replace_files, PartialFile.discard
    looked = []

    def refused(where):
        looked.append(where)
        with pytest.raises(MissingFileError, match="another process is writing this"):
            FeatureFile(str(target), **{option: True})

    def while_it_is_written(*arguments):
        refused("before")
        replace(*arguments)
        refused("after")

    def while_they_are_deleted(self):
        refused(self.path.name)
        discard(self)

    monkeypatch.setattr("vit_cli.runs.rows.replace_files", while_it_is_written)
    monkeypatch.setattr(PartialFile, "discard", while_they_are_deleted)
    file.finish()
    assert looked == ["before", "after", "out.npz.partial.rows", "out.npz.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    check(target, 1)


def test_what_ends_while_the_file_is_made(tmp_path, capsys, monkeypatch):
    """A Ctrl-C leaves nothing but what --resume needs; the next run deletes what a SIGKILL left."""
    target = tmp_path / "out.npz"
    file = FeatureFile(str(target))
    file.write(*vectors(1)[0])

    def write(self, stream):
        stream.write(b"some")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureFile, "_npz", write)
        with pytest.raises(KeyboardInterrupt):
            file.finish()
    assert "--resume makes the file of it" in capsys.readouterr().err
    left = ["out.npz.partial", "out.npz.partial.rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    (tmp_path / ".out.npz.badd550a.tmp").write_bytes(b"some")
    FeatureFile(str(target), resume=True).finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    check(target, 1)


def test_a_forced_run_can_be_resumed(tmp_path):
    target = tmp_path / "out.npz"
    target.write_bytes(b"old")
    file = FeatureFile(str(target), force=True)
    file.write(*vectors(2)[0])
    file.close()
    file = FeatureFile(str(target), resume=True)
    file.write(*vectors(2)[1])
    file.finish()
    check(target, 2)
    with pytest.raises(ExistingFileError, match="already there, and whole"):
        FeatureFile(str(target), resume=True)


def test_a_full_disk_keeps_what_there_is(tmp_path):
    """The limit on a file's size stands for a disk without room."""
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from vit_cli.runs.feature_file import FeatureFile\n"
        "from vit_common.errors import MissingFileError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "file = FeatureFile(sys.argv[1])\n"
        "try:\n"
        "    for i in range(100):\n"
        "        file.write(f'{i}.png', np.full(100, i, np.float32)); file.flush()\n"
        "    file.finish()\n"
        "except MissingFileError as error:\n"
        "    print(error)\n"
        "    file.close()\n"
    )
    target = tmp_path / "out.npz"
    command = [sys.executable, "-c", script, str(target)]
    done = subprocess.run([*command, "20000"], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == (
        f"{target}.partial.rows: cannot be written (File too large). What was done is kept; "
        "--resume goes on from there."
    ), done.stderr
    file = FeatureFile(str(target), resume=True)
    assert file.count == 50
    file.finish()
    check(target, 50)
    target.unlink()
    # Room for the vectors, 40,000 bytes, but not for the names beside them in the file itself.
    done = subprocess.run([*command, "41000"], capture_output=True, text=True, check=False)
    assert "cannot be written (File too large)" in done.stdout, done.stderr
    assert "--resume makes the file of it" in done.stdout
    assert not target.exists()
    FeatureFile(str(target), resume=True).finish()
    check(target, 100)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc on this system")
@pytest.mark.parametrize(
    "suffix",
    ["npz", *(pytest.param(name, marks=pytest.mark.slow) for name in ("safetensors", "parquet"))],
)
def test_memory_does_not_grow_with_the_images(tmp_path, suffix):
    script = (
        "import sys, numpy as np\n"
        "from vit_cli.runs import feature_file\n"
        "from vit_cli.runs.feature_file import FeatureFile\n"
        "feature_file._GROUP_BYTES = 1 << 20\n"  # else pyarrow's buffers grow up to 60 MB first
        "row = np.random.default_rng(0).normal(size=1024).astype(np.float32)\n"
        "file = FeatureFile(sys.argv[1], force=True)\n"
        "for i in range(int(sys.argv[2])): file.write(f'{i}.png', row)\n"
        "file.finish()\n"
        "status = open('/proc/self/status').read()\n"
        "print(status.partition('VmHWM:')[2].split()[0])\n"
    )
    target = tmp_path / f"out.{suffix}"
    peaks = []
    for rows in (5_000, 25_000):  # 20 and 98 MB
        command = [sys.executable, "-c", script, str(target), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    # MB; measured 3 to 10, most of it the names
    assert peaks[1] - peaks[0] < 30


def test_vectors_without_names_are_nobodys(tmp_path):
    (tmp_path / "out.npz.partial.rows").write_bytes(b"1234")
    file = FeatureFile(str(tmp_path / "out.npz"), resume=True)
    file.write(*vectors(1)[0])
    file.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    check(tmp_path / "out.npz", 1)


# -- odd things


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_are_no_text(tmp_path, suffix):
    target = tmp_path / f"out.{suffix}"
    names = ["plain.png", "Zürich 写真.png", "bytes\udcff.png", 'quote".png\n']
    file = FeatureFile(str(target))
    for name in names:
        file.write(name, np.zeros(2, np.float32))
    file.fail("broken\udcfe.png", "why\udcfe")
    file.finish()
    _, files, failed, errors, _ = read(target)
    if suffix == "parquet":
        assert files == [*names[:2], "bytes\\udcff.png", names[3]]
    else:
        assert files == names
        assert (failed, errors) == (["broken\udcfe.png"], ["why\udcfe"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_image_has_features(tmp_path, suffix):
    target = tmp_path / f"out.{suffix}"
    file = FeatureFile(str(target))
    file.fail("a.png", "broken")
    file.finish()
    features, files, failed, errors, _ = read(target)
    assert features.size == 0
    assert (files, failed, errors) == ([], ["a.png"], ["broken"])


def test_numbers_that_half_precision_cannot_hold(tmp_path):
    target = tmp_path / "out.npz"
    file = FeatureFile(str(target), dtype="float16")
    error = file.write("a.png", np.array([1.0, 7e4], np.float32))
    assert "float16 cannot hold its features (up to 7e+04); store float32" in str(error)
    assert file.write("b.png", np.array([1.0, 6e4], np.float32)) is None
    file.finish()
    features, files, failed, *_ = read(target)
    assert (features.shape, files, failed) == ((1, 2), ["b.png"], ["a.png"])


def test_more_names_than_safetensors_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_cli.runs.feature_file.MAX_JSON_BYTES", 300)
    file = FeatureFile(str(tmp_path / "out.safetensors"))
    for name, row in vectors(30):
        file.write(name, row)
    with pytest.raises(InputError, match="more than the header of a safetensors file may hold"):
        file.finish()
    for end in ("partial", "partial.rows"):  # as the message says
        os.rename(tmp_path / f"out.safetensors.{end}", tmp_path / f"X.npz.{end}")
    FeatureFile(str(tmp_path / "X.npz"), resume=True).finish()
    check(tmp_path / "X.npz", 30)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name at least one image"),
        (["x.png"], "--output FILE is needed"),
        (["x.png", "--output", "x.txt"], "--output must end in .npz, .parquet, .safetensors"),
        (["x.png", "--output", "no/such/x.npz"], "no/such: no such directory"),
        (["x.png", "--output", "x.npz", "--layers", "a"], "must be numbers of blocks"),
        (["x.png", "--output", "x.npz", "--pool", "max"], "invalid choice"),
        (["x.png", "--output", "x.npz", "--model", "/no/model"], "/no/model"),
    ],
)
def test_the_command_refuses(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["features", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
