"""The command `vit`: most of it in this process, and as a process where that is the point."""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import transformers
from hub_server import Repository, hub_server
from networks import flax_twin, make_config, random_weights
from safetensors.numpy import load_file

import vit_cli.commands.predict
from vit_cli.main import _COMMANDS, main
from vit_cli.runtime import float32_products
from vit_cli.terminal.messages import one_line, printable, say
from vit_cli.terminal.progress import Progress
from vit_cli.terminal.results import PlainText, Table
from vit_common.images.find import find_images
from vit_common.images.processor import ViTImageProcessor
from vit_flax import FlaxViTForImageClassification, FlaxViTModel
from vit_flax.inference import ImageClassifier, Prediction

DIGITS = Path(__file__).parents[1] / "vit_common" / "digits"
LABELS = ["cat", "dog", "a tree, and more", "Zürich", "写真"]
HEAVY = ("jax", "jaxlib", "flax", "numpy", "PIL", "torch", "huggingface_hub", "rich", "typer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights."""
    path = tmp_path_factory.mktemp("models") / "model"
    config = make_config(id2label=dict(enumerate(LABELS)), num_hidden_layers=1)
    flax_twin(
        FlaxViTForImageClassification, config, random_weights(config, "classifier")
    ).save_pretrained(path)
    ViTImageProcessor(size=32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def classifier(folder):
    return ImageClassifier.from_pretrained(folder)


@pytest.fixture
def loaded(classifier, monkeypatch):
    """Let the command have a model that is loaded and compiled; tells how it was asked for."""
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return classifier

    monkeypatch.setattr(ImageClassifier, "from_pretrained", from_pretrained)
    return asked


def save_image(path, seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def images(tmp_path):
    """A folder of five images in two levels, with other files among them."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    names = ["b.png", "a.jpg", "C.PNG", "sub/d.webp", "sub/e.tiff"]
    for i, name in enumerate(names):
        save_image(root / name, seed=i)
    (root / "notes.txt").write_text("no image")
    (root / "sub" / "empty").mkdir()
    os.mkfifo(root / "pipe.png")  # to be opened by nobody, or the walk hangs
    return root


IN_ORDER = ["C.PNG", "a.jpg", "b.png", "sub/d.webp", "sub/e.tiff"]


COMMANDS = ["predict", "features", "attention", "convert", "export", "bench"] + [
    "inspect",
    "verify",
    "info",
    "search",
    "zeroshot",
    "completion",
]


def run(*arguments, env=None, **options):
    """The command as a process of its own."""
    unwanted = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return subprocess.Popen(
        [sys.executable, "-m", "vit_cli", *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**kept, "JAX_PLATFORMS": "cpu", **(env or {})},
        **options,
    )


def lines(text):
    assert "Traceback" not in text
    return text.splitlines()


# -- help and version


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys, time\n"
        "from vit_cli.main import main\n"
        f"asked = [['--help'], ['--version'], *([name, '--help'] for name in {COMMANDS!r})]\n"
        "codes = [main(arguments) for arguments in asked]\n"
        f"print(codes, [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    assert out.stdout.splitlines()[-1] == f"{[0] * (2 + len(COMMANDS))} []"
    assert "predict" in out.stdout
    assert "--batch-size" in out.stdout
    # 0.07 s on a quiet machine; others may be using this one.
    assert took < 2.0


def test_version(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    try:
        expected = importlib.metadata.version("vitflax")
    except importlib.metadata.PackageNotFoundError:
        expected = "unknown"
    assert out == f"vit {expected}\n"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["predict", "-h"], ["info", "--help"]])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: vit")


def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        process = run("--help", stdout=full, stderr=subprocess.PIPE, text=True)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "vit: error: the output cannot be written (No space left on device).\n"

    reading, writing = os.pipe()
    os.close(reading)
    process = run("--help", stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["nope"],
            f"no such command: nope; wanted one of {', '.join(_COMMANDS)}; see `vit --help`",
        ),
        (["--nope"], "no such option: --nope; see `vit --help`"),
        (["predict"], "name at least one image or folder; see `vit predict --help`"),
        (["predict", "x", "--nope"], "unrecognized arguments: --nope"),
        (["predict", "x", "--batch-size", "0"], "must be a positive integer; given '0'"),
        (["predict", "x", "--top-k", "many"], "must be a positive integer; given 'many'"),
        (["predict", "x", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["info", "a", "b"], "wanted one model; given a, b; see `vit info --help`"),
    ],
)
def test_options_that_are_wrong(arguments, said, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(lines(err)) == 1
    assert err.startswith("vit: error: ")
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["a", "--top-k", "3", "b"], ["a", "b"]),
        (["--json", "--", "-a", "--json"], ["-a", "--json"]),
        (["a", "--", "-b", "--", "c"], ["a", "-b", "--", "c"]),
        (["-"], ["-"]),
    ],
    ids=str,
)
def test_names_and_options_in_any_order(arguments, names, monkeypatch):
    seen = []
    monkeypatch.setattr(vit_cli.commands.predict, "run", lambda options: seen.extend(options.names))
    main(["predict", *arguments])
    assert seen == names


# -- predict


def test_json_lines(folder, classifier, images, capsys):
    assert main(["predict", str(images), "--model", str(folder), "--json", "--batch-size=2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.isascii()
    table = [json.loads(line) for line in out.splitlines()]
    paths = [str(images / name) for name in IN_ORDER]
    assert [row["file"] for row in table] == paths
    expected = classifier(paths)
    for row, predictions in zip(table, expected, strict=True):
        assert list(row) == ["file", "predictions"]
        assert [list(each) for each in row["predictions"]] == [
            ["label", "index", "probability"]
        ] * 5
        assert [each["index"] for each in row["predictions"]] == [p.index for p in predictions]
        assert [LABELS[each["index"]] for each in row["predictions"]] == [
            each["label"] for each in row["predictions"]
        ]
        np.testing.assert_allclose(
            [each["probability"] for each in row["predictions"]],
            [p.probability for p in predictions],
            rtol=0,
            atol=2e-6,
        )


def test_plain_text(loaded, folder, images, capsys):
    names = [str(images / "b.png"), str(images / "sub")]
    # An option between the names, and more classes than there are.
    assert main(["predict", names[0], "--top-k", "99", "--model", str(folder), names[1]]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [re.fullmatch(r"(\S+) +(0\.\d{4})  (.+)", line) for line in out.splitlines()]
    assert len(rows) == 3 * 5
    assert len({row.start(2) for row in rows}) == 1
    assert [row[1] for row in rows[::5]] == [
        str(images / name) for name in ("b.png", "sub/d.webp", "sub/e.tiff")
    ]
    assert {row[3] for row in rows} == set(LABELS)
    assert "\x1b" not in out


def test_default_model(capsys):
    from vit_common.embedded import embedded_images

    paths = embedded_images()
    assert main(["predict", *map(str, paths), "--top-k=1", "--json"]) == 0
    table = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    digits = [path.name.split("-")[1] for path in paths]
    right = [
        row["predictions"][0]["index"] == int(digit)
        for row, digit in zip(table, digits, strict=True)
    ]
    assert sum(right) >= len(paths) - 1


def test_files_that_fail_are_named_and_skipped(loaded, folder, images, tmp_path, capsys):
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:500])
    (images / "bad.jpg").write_bytes(b"not an image")
    (images / "gone.png").symlink_to(tmp_path / "nowhere")
    code = main(["predict", str(images), str(images / "no.png"), "--model", str(folder), "--json"])
    assert code == 1
    out, err = capsys.readouterr()
    done = [json.loads(line)["file"] for line in out.splitlines()]
    assert done == [str(images / name) for name in IN_ORDER if name != "b.png"]
    said = [line.removeprefix(f"vit: error: {images}/").split(":")[0] for line in lines(err)]
    assert said == ["b.png", "bad.jpg", "gone.png", "no.png"]


def test_the_limit_on_pixels(loaded, folder, tmp_path, capsys):
    image = save_image(tmp_path / "a.png", size=(40, 30))
    assert main(["predict", "--model", str(folder), image, "--max-pixels", "1198"]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith(f"vit: error: {image}: too large: Image size (1200 pixels) exceeds")
    assert "limit of 1198 pixels" in line
    assert line.endswith("in a command, --max-pixels.")
    assert main(["predict", "--model", str(folder), image, "--max-pixels", "1200"]) == 0


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("predict", ["a.png"]),
        ("features", ["a.png", "--output", "a.npz"]),
        ("attention", ["a.png", "--output", "b.png"]),
        ("bench", ["a.png"]),
        ("verify", ["model", "--images", "a.png"]),
    ],
)
def test_the_limit_on_pixels_is_set_for_as_long_as_a_command_runs(command, names, monkeypatch):
    seen = []

    def run(*_, **__):
        seen.append(PIL.Image.MAX_IMAGE_PIXELS)
        raise ValueError

    before = PIL.Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(f"vit_cli.commands.{command}.run", run)
    assert main([command, *names]) == 2
    assert main([command, *names, "--max-pixels", "400000000"]) == 2
    assert seen == [before, 200_000_000]  # Pillow refuses twice as many
    assert before == PIL.Image.MAX_IMAGE_PIXELS


def test_any_named_file_is_tried(loaded, folder, images, capsys):
    odd = images / "an image.dat"
    (images / "b.png").rename(odd)
    assert main(["predict", str(odd), str(images / "notes.txt"), "--model", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "notes.txt: not an image" in err


def test_a_folder_without_images(loaded, folder, images, capsys):
    empty = str(images / "sub" / "empty")
    assert main(["predict", empty, "--model", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert lines(err)[0].startswith(f"vit: error: {empty}: no images in this folder; looked for ")
    assert main(["predict", empty, str(images / "a.jpg"), "--model", str(folder)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_find_images_reports_a_folder_that_cannot_be_read(images, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("empty"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    said = []
    found = list(find_images([str(images)], said.append))
    assert found == [str(images / name) for name in IN_ORDER]
    assert said == [f"{images}/sub/empty: this folder cannot be read (Permission denied)."]


def test_links_to_folders_are_not_followed(images):
    (images / "sub" / "again").symlink_to(images)
    assert len(list(find_images([str(images)], pytest.fail))) == 5
    # One that is named is.
    assert len(list(find_images([str(images / "sub" / "again")], pytest.fail))) == 5


def test_links_that_lead_nowhere_are_images(images):
    """Reading them says what is wrong; the rest of the folder is found all the same."""
    odd = images / "sub" / "odd"
    odd.mkdir()
    (odd / "loop.png").symlink_to("loop.png")
    (odd / "nothing.png").symlink_to("nothing")
    (odd / "through.png").symlink_to(images / "a.jpg" / "x.png")
    (odd / "loop").symlink_to("loop")
    (odd / "z.jpg").symlink_to(images / "a.jpg")
    found = [os.path.basename(path) for path in find_images([str(odd)], pytest.fail)]
    assert found == ["loop.png", "nothing.png", "through.png", "z.jpg"]


def test_what_cannot_be_looked_at(images, monkeypatch):
    """Only the names can be read, as in a folder that may be listed and no more."""
    scandir = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.path = entry.name, entry.path
            odd = entry.name in ("b.png", "notes.txt")
            self.is_file = self.is_symlink = self.refuse if odd else entry.is_file
            self.is_dir = self.refuse if odd else entry.is_dir

        def refuse(self, **_):
            raise PermissionError(13, "Permission denied", self.path)

    def listed(path):
        with scandir(path) as entries:
            return contextlib.nullcontext([*map(Entry, entries)])

    monkeypatch.setattr(os, "scandir", listed)
    said = []
    found = list(find_images([str(images)], said.append))
    assert found == [str(images / name) for name in IN_ORDER]
    assert said == [f"{images}/notes.txt: this folder cannot be read (Not a directory)."]


NAMES = [
    "写真とても.png",
    "two\nlines.png",
    "\x1b[31mred.png",
    "[bold]markup[bold].png",
    os.fsdecode(b"\xff\xfe bytes.png"),
    "x" * 200 + ".png",
]


def test_odd_names(loaded, folder, tmp_path, capsys):
    for name in NAMES:
        save_image(tmp_path / name)
    arguments = ["predict", str(tmp_path), "--model", str(folder), "--top-k=1"]
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert sorted(json.loads(line)["file"] for line in out.splitlines()) == sorted(
        str(tmp_path / name) for name in NAMES
    )
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(NAMES)
    for shown in (
        "写真とても.png",
        r"two\nlines.png",
        r"\x1b[31mred.png",
        "[bold]markup[bold].png",
        r"\xff\xfe bytes.png",
        "x" * 200 + ".png",
    ):
        assert str(tmp_path / shown) in out


def test_printable():
    assert printable("a ü 写") == "a ü 写"
    assert printable("a\nb\x1b\x00\u202e") == r"a\nb\x1b\x00\u202e"
    assert printable("\udcff\ud800") == r"\xff\ud800"
    assert one_line("a\n  b\tc ") == "a b c"


def test_names_in_messages_stay_as_they_are(capsys):
    say("error", "a  b\nc.png: not an image")
    say(" done\t")
    assert capsys.readouterr().err == "vit: error: a  b\\nc.png: not an image\nvit:  done\\t\n"


def test_options_reach_the_model(loaded, images, capsys):
    options = ["--dtype=bfloat16", "--revision=v1", "--subfolder=s", "--local-files-only"]
    assert main(["predict", str(images / "a.jpg"), "--model", "owner/name", *options]) == 0
    hub = {"revision": "v1", "subfolder": "s", "local_files_only": True}
    assert loaded == [("owner/name", {"dtype": "bfloat16", **hub})]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_models_that_cannot_be_used(folder, images, tmp_path, capsys):
    image = str(images / "a.jpg")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[:5000] if path.suffix == ".safetensors" else data)
    bare = tmp_path / "bare"
    config = make_config()
    flax_twin(FlaxViTModel, config, random_weights(config)).save_pretrained(bare)
    for model, said in [
        (tmp_path / "nothing", "nothing: no such file or directory"),
        (images, "no weights there; looked for model.safetensors"),
        (broken, "model.safetensors: "),
        (bare, "no classifier, so predictions would be random"),
    ]:
        assert main(["predict", image, "--model", str(model)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(lines(err)) == 1
        assert err.startswith("vit: error: ")
        assert said in err


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines(folder, images, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    shown = warnings.showwarning
    assert main(["predict", str(images / "a.jpg"), "--model", str(tmp_path)]) == 0
    assert warnings.showwarning is shown
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert len(lines(err)) == 1
    assert err.startswith(f"vit: warning: {tmp_path} has no preprocessor_config.json: ")


def test_unexpected_errors_are_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("this should not\nhave happened")

    monkeypatch.setattr(vit_cli.commands.predict, "run", fail)
    monkeypatch.delenv("VIT_DEBUG", raising=False)
    assert main(["predict", "x"]) == 2
    err = capsys.readouterr().err
    assert lines(err) == [
        "vit: error: RuntimeError: this should not have happened "
        "(unexpected; VIT_DEBUG=1 shows where it comes from)"
    ]
    monkeypatch.setenv("VIT_DEBUG", "1")
    assert main(["predict", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("vit: error: RuntimeError: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 2, "out of memory; try a smaller --batch-size"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 2, "out of memory; try a smaller --batch-size"),
        (OSError(28, "No space left on device"), 2, "cannot be written (No space left on device)"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
    ids=["memory", "device memory", "disk", "pipe"],
)
def test_errors_of_the_system(monkeypatch, capsys, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(vit_cli.commands.predict, "run", fail)
    assert main(["predict", "x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(lines(err)) == (1 if said else 0)


def test_no_device(monkeypatch, capsys, folder, images):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for arguments in (["info"], ["predict", str(images), "--model", str(folder)]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert lines(err)[0].startswith(
            "vit: error: JAX finds no device to run on: Unable to initialize backend 'tpu'"
        )


def test_interrupt_keeps_what_was_done(loaded, folder, images, monkeypatch, capsys):
    stream = ImageClassifier.stream

    def interrupted(self, paths, **options):
        results = stream(self, paths, **options)
        with contextlib.closing(results):
            for _ in range(3):
                yield next(results)
            raise KeyboardInterrupt

    monkeypatch.setattr(ImageClassifier, "stream", interrupted)
    previous = signal.signal(signal.SIGINT, handler := lambda *_: None)
    try:
        code = main(["predict", str(images), "--model", str(folder), "--json", "--batch-size=2"])
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert code == 130
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 3
    assert lines(err) == ["vit: interrupted: 3 of 5 images done"]

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["predict", str(images), "--model", str(folder), "--batch-size=2"]) == 130
    assert all(name in sys.stdout.getvalue() for name in IN_ORDER[:3])


# -- what terminals see


class Terminal(io.StringIO):
    def isatty(self):
        return True


PREDICTIONS = [
    Prediction("Egyptian cat", 285, 0.44),
    Prediction("a label that is far longer than any terminal has room for in one line", 1, 0.25),
]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    files = ["short.png", "a/long/path/to/a/photograph/of/something/or/other/in/summer-001.jpeg"]
    out = Terminal()
    table = Table(out, files, [p.label for p in PREDICTIONS])
    for file in files:
        table.write(file, PREDICTIONS)
        table.flush()
    rows = [row for row in screen(out.getvalue().replace("\n", "\r\n")) if row]
    text = "\n".join(rows)
    assert max(map(len, rows)) <= width
    assert rows[0].split() == ["file", "probability", "label"]
    assert text.count("0.4400") == text.count("0.2500") == 2
    # Nothing is cut off: each column, read downwards, is whole.
    column = rows[0].index("probability")
    names = "".join(row[:column].rstrip() for row in rows[1:]).replace("…", "")
    assert names == "".join(files)
    label = rows[0].index("label")
    words = " ".join(row[label:].strip() for row in rows[1:]).split()
    assert words == " ".join(p.label for _ in files for p in PREDICTIONS).split()


def test_plain_text_is_aligned_for_wide_characters():
    out = io.StringIO()
    files = ["写真写真.png", "plain.png", "e\u0301.png"]
    writer = PlainText(out, files)
    for file in files:
        writer.write(file, PREDICTIONS[:1])
    cells = [
        line.index("0.44") + line.count("写真") * 2 - ("\u0301" in line)
        for line in out.getvalue().splitlines()
    ]
    assert cells == [14, 14, 14]


@pytest.mark.parametrize(("total", "shown"), [(8, False), (9, True)])
def test_progress_only_on_more_than_a_few(total, shown, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    kept = warnings.showwarning
    with Progress(total) as progress:
        progress.advance(3)
        progress.say("error", "a.png: broken")
    assert warnings.showwarning is kept
    text = sys.stderr.getvalue()
    assert (f"3/{total}" in text) is shown
    assert "vit: error: a.png: broken\n" in text


def test_no_progress_without_a_terminal(monkeypatch, capsys):
    with Progress(100) as progress:
        progress.advance(50)
    assert capsys.readouterr().err == ""


def test_without_rich(loaded, folder, images, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "rich" else find_spec(name, *more),
    )
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["predict", str(images), "--model", str(folder), "--top-k=1"]) == 0
    assert len(sys.stdout.getvalue().splitlines()) == 5
    assert sys.stderr.getvalue() == (
        "vit: warning: tables and progress bars need rich; run: pip install rich\n"
    )


# -- processes


def on_terminal(*arguments, columns):
    """Run the command on a terminal; returns the exit code and everything that was written."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = run(
        *arguments,
        env={"TERM": "xterm-256color"},
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
    )
    os.close(secondary)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal ends when nobody writes to it any more
        while chunk := os.read(primary, 65536):
            seen += chunk
    os.close(primary)
    return process.wait(timeout=60), seen.decode()


def screen(text):
    """The lines that stay on a terminal, without colours; it knows what a progress bar uses."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|.", text, re.DOTALL):
        if part == "\n":
            row += 1
            if row == len(rows):
                rows.append("")
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part.endswith("A"):
            row -= 1
        elif not part.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
            column += 1
    return [row.rstrip() for row in rows]


def test_on_a_terminal(folder, tmp_path):
    for i in range(12):
        save_image(tmp_path / f"{i:02d}.png", seed=i)
    (tmp_path / "05.png").write_bytes(b"junk")
    code, seen = on_terminal(
        "predict", tmp_path, "--model", folder, "--top-k=2", "--batch-size=4", columns=80
    )
    assert code == 1
    assert "Traceback" not in seen
    for count in (0, 4, 8, 12):
        assert f"{count}/12" in seen
    rows = screen(seen)
    assert not [row for row in rows if "classifying" in row]
    assert [row.split() for row in rows].count(["file", "probability", "label"]) == 1
    assert len([row for row in rows if re.search(r"  0\.\d{4}  ", row)]) == 11 * 2
    assert [row for row in rows if row.startswith(f"vit: error: {tmp_path}"[:80])]
    named = [name for row in rows for name in re.findall(r"(\d\d\.png)  ", row)]
    assert named == [f"{i:02d}.png" for i in range(12) if i != 5]


@pytest.mark.slow
def test_a_model_from_the_hub_into_a_pipe_that_closes(folder, images, tmp_path):
    with hub_server() as server:
        server.repositories["someone/digits"] = repository = Repository()
        repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
        process = run(
            "predict",
            *[images / "a.jpg"] * 2000,
            *("--model", "someone/digits", "--batch-size=4", "--json"),
            env={
                "HF_ENDPOINT": server.url,
                "HF_HUB_CACHE": str(tmp_path / "cache"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert json.loads(process.stdout.readline())["file"] == str(images / "a.jpg")
        process.stdout.close()
        err = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait(timeout=60) == 141
    assert err == ""


def test_ctrl_c(folder, images, tmp_path):
    out = tmp_path / "out"
    with out.open("wb") as stream:
        process = run(
            "predict",
            *[images / "a.jpg"] * 5000,
            *("--model", folder, "--batch-size=4", "--json"),
            stdout=stream,
            stderr=subprocess.PIPE,
        )
        while not out.stat().st_size and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait(timeout=60) == 130
    said = re.fullmatch(r"vit: interrupted: (\d+) of 5000 images done\n", err)
    assert said, err
    table = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(table) == int(said[1])
    assert 4 <= len(table) < 5000


# -- info


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = ["vitflax", "python", "jax", "jaxlib", "flax", "numpy", "pillow", "safetensors"]
    assert list(report["versions"]) == [*names, "huggingface_hub", "torch"]
    for name in names[2:]:
        assert report["versions"][name] == importlib.metadata.version(name)
    assert report["platform"] == jax.default_backend()
    assert report["devices"] == [device.device_kind for device in jax.devices()]
    assert report["matmul_precision"]["setting"] == "default"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^jax +{re.escape(importlib.metadata.version('jax'))}$", out, re.MULTILINE)
    if jax.default_backend() == "cpu":
        assert "float32 matrix products in float32 (setting: default)" in out


def test_info_follows_the_setting(capsys):
    with jax.default_matmul_precision("highest"):
        assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["matmul_precision"] == {"setting": "highest", "float32": "float32"}


def test_info_does_not_import_torch(folder):
    code = (
        "import sys\n"
        "from vit_cli.main import main\n"
        f"code = main(['info', {str(folder)!r}])\n"
        "print(code, 'torch' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "0 False"


# NUMERICS of the devices: TF32 from compute capability 8.0 on unless "highest" is asked for
# (https://docs.jax.dev/en/latest/default_dtypes.html, jax.default_matmul_precision); one, three or
# six passes of bfloat16 on a TPU.
@pytest.mark.parametrize(
    ("platform", "capability", "setting", "expected"),
    [
        ("cpu", None, None, "float32"),
        ("cpu", None, "bfloat16", "float32"),
        ("gpu", "7.5", None, "float32"),
        ("gpu", "8.0", None, "tensorfloat32"),
        ("gpu", "9.0", "high", "tensorfloat32"),
        ("gpu", "9.0", "highest", "float32"),
        ("gpu", "12.0", "float32", "float32"),
        ("gpu", "gfx942", None, "float32"),
        ("tpu", None, None, "bfloat16"),
        ("tpu", None, "tensorfloat32", "three passes of bfloat16"),
        ("tpu", None, "highest", "float32"),
        ("gpu", "9.0", "TF32_TF32_F32", "tf32_tf32_f32"),
    ],
)
def test_float32_products(platform, capability, setting, expected):
    assert float32_products(platform, capability, setting) == expected


def test_info_of_a_model(folder, capsys):
    assert main(["info", str(folder), "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    reference = transformers.ViTForImageClassification.from_pretrained(folder)
    assert model["parameters"] == reference.num_parameters()
    assert model["labels"] == LABELS
    assert model["head"] == "classifier"
    assert (model["layers"], model["width"], model["heads"]) == (1, 48, 4)
    assert model["input"] == {"channels": 3, "height": 32, "width": 32}
    assert model["preprocessing"]["size"] == {"height": 32, "width": 32}
    weights = model["weights"]
    assert weights["path"] == str(folder / "model.safetensors")
    assert (weights["container"], weights["format"]) == ("safetensors", "hub")
    assert weights["dtypes"] == ["float32"]
    assert weights["bytes"] == (folder / "model.safetensors").stat().st_size
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "labels             5: cat; dog; a tree, and more; Zürich; 写真\n" in out


def test_info_of_the_attention_kernel(folder, capsys, monkeypatch):
    def asked(*options):
        assert main(["info", str(folder), *options]) == 0
        (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("attention "))
        return line.removeprefix("attention").strip()

    if jax.default_backend() == "cpu":
        assert asked() == "cpu: the kernel for cpu (1 image, float32)"
    monkeypatch.setattr("vit_cli.commands.info.compiled_for", lambda device: "tpu")
    assert asked("--batch", "64", "--dtype", "bfloat16") == (
        "pallas: the kernel for tpu (64 images, bfloat16)"
    )
    assert asked("--dtype", "float16").startswith("eager: pallas takes bfloat16 and float32")
    assert main(["info", str(folder), "--json", "--batch", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["attention"]["batch"] == 3


def test_info_of_other_weights(tmp_path, capsys):
    config = make_config("narrow mlp")
    twin = flax_twin(FlaxViTModel, config, random_weights(config))
    twin.save_pretrained(tmp_path, safe_serialization=False)
    for name in (tmp_path, tmp_path / "flax_model.msgpack"):
        assert main(["info", str(name), "--json"]) == 0
        model = json.loads(capsys.readouterr().out)["model"]
        reference = transformers.ViTModel(transformers.ViTConfig(**config.to_dict()))
        assert model["parameters"] == reference.num_parameters()
        assert model["head"] is None
        assert (model["weights"]["container"], model["weights"]["format"]) == ("msgpack", "flax")
        assert model["preprocessing"] is None
    (tmp_path / "flax_model.msgpack").unlink()
    assert main(["info", str(tmp_path)]) == 0
    assert "none here, or not downloaded yet" in capsys.readouterr().out


@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
def test_info_of_nothing(tmp_path, capsys, json_flag):
    assert main(["info", str(tmp_path / "nothing"), *json_flag]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert lines(err) == [f"vit: error: {tmp_path}/nothing: no such file or directory."]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predcit", "x"], "no such command: predcit (did you mean predict?); wanted one of"),
        (["--verison"], "no such option: --verison (did you mean --version?); see `vit --help`"),
        (
            ["predict", "x", "--modle", "y", "--topk=3"],
            "unrecognized arguments: --modle (did you mean --model?), --topk=3 (did you mean "
            "--top-k?); see `vit predict --help`",
        ),
        (["attention", ".", "--output", "map.png"], "wanted one image; given ., a folder"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_weights_of_another_shape_are_listed_line_by_line(tmp_path, capsys):
    """The advice stands before the list, a line break is never printed as `\\n`, and a whole
    network of another size does not fill the screen."""
    for path in DIGITS.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    assert (
        main(["predict", str(next((DIGITS / "images").iterdir())), "--model", str(tmp_path)]) == 2
    )
    err = capsys.readouterr().err
    assert "\\n" not in err
    head, *faults = err.splitlines()
    assert "Give the configuration these weights were made with" in head
    shapes = load_file(DIGITS / "model.safetensors")
    wide = sum(48 in array.shape for array in shapes.values())
    assert len(faults) == 11
    assert faults[-1] == f"  - and {wide - 10} more"


def test_the_last_line_counts_images_that_could_not_be_read(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    image = (DIGITS / "images" / "digit-3-01.png").read_bytes()
    (photos / "a.png").write_bytes(image)
    (photos / "b.png").write_bytes(image[:40])
    for name, said in (("a.csv", "2 images"), ("a.npz", "1 x 48 float32")):
        command = "predict" if name == "a.csv" else "features"
        assert main([command, str(photos), "--output", str(tmp_path / name)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"vit: wrote {tmp_path / name}: {said}; 1 image could not be read"


def test_an_interruption_counts_what_earlier_runs_did(
    loaded, images, tmp_path, monkeypatch, capsys
):
    stream = ImageClassifier.stream

    def interrupted(self, paths, **options):
        results = stream(self, paths, **options)
        with contextlib.closing(results):
            yield next(results)
            raise KeyboardInterrupt

    monkeypatch.setattr(ImageClassifier, "stream", interrupted)
    command = ["predict", str(images), "--output", str(tmp_path / "out.csv")]
    assert main(command) == 130
    capsys.readouterr()
    assert main([*command, "--resume"]) == 130
    last = lines(capsys.readouterr().err)[-1]
    assert last == "vit: interrupted: 2 of 5 images done; --resume goes on from there"
