"""Images through Ray Data: what runs in an actor, which needs no Ray, and `--on ray`, which does.

The peer of a result is the same model without Ray; that it is right is shown elsewhere.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from vit_cli.main import main as vit
from vit_cli.runs.ray_run import _Output
from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_common.errors import ExistingFileError, HostError, InputError
from vit_flax.inference import ImageClassifier, ImageEncoder
from vit_flax.inference.ray_data import ImageFeatures, ImagePredictions

NAMES = [str(path) for path in embedded_images()]


def vectors(table: pa.Table) -> np.ndarray:
    return np.array([row for row in table["features"].to_pylist() if row is not None], np.float32)


@pytest.fixture(name="embed", scope="module")
def embed_fixture():
    return ImageFeatures(batch_size=4)


@pytest.fixture(name="wanted", scope="module")
def wanted_fixture():
    return ImageEncoder.from_pretrained(embedded_checkpoint()).features(NAMES)


def test_features_of_names_bytes_and_arrays(embed, wanted):
    """As `ImageEncoder.features`, however many rows a batch has and however they are given; one
    program for all."""
    held = [Path(name).read_bytes() for name in NAMES]
    batches = [
        {"file": np.array(NAMES)},
        {"uri": np.array([f"file://{name}" for name in NAMES])},
        {"bytes": np.array(held, object), "path": np.array(NAMES)},
        {"image": np.stack([np.asarray(PIL.Image.open(name)) for name in NAMES])},
        {"image": [{"bytes": each, "path": None} for each in held]},
    ]
    for batch in batches:
        found = embed(batch)
        np.testing.assert_allclose(vectors(found), wanted, rtol=0, atol=2e-6)
        assert found["error"].null_count == len(NAMES)
    for count in (0, 1, 5):
        found = embed({"file": NAMES[:count], "row": np.arange(count)})
        assert found.column_names == ["file", "row", "features", "error"]
        np.testing.assert_allclose(vectors(found).reshape(-1, 48), wanted[:count], atol=2e-6)
    assert embed.compilations == 1
    assert found.schema.field("features").type == pa.list_(pa.float32(), 48)


def test_bad_images_are_rows_with_an_error(embed, wanted, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"junk")
    files = [NAMES[0], str(bad), None, "nothing.png", f"file://{tmp_path}/no.png", NAMES[1]]
    found = embed({"file": files})
    assert found["file"].to_pylist() == files
    np.testing.assert_allclose(vectors(found), wanted[:2], atol=2e-6)
    errors = found["error"].to_pylist()
    assert [error is None for error in errors] == [True, False, False, False, False, True]
    assert errors[1].startswith(f"{bad}: not an image")
    assert "no image in this row" in errors[2]
    assert "nothing.png: cannot be opened" in errors[3]
    assert f"file://{tmp_path}/no.png: cannot be read" in errors[4]
    named = embed({"source": [str(bad)], "file": ["short.png"]})["error"][0].as_py()
    assert named.startswith("short.png: not an image")  # its name, not where it is read


@pytest.mark.slow
def test_predictions_are_those_of_the_classifier():
    classify = ImagePredictions(top_k=2, batch_size=8, keep=["id"])
    found = classify({"file": [*NAMES, "no.png"], "id": np.arange(len(NAMES) + 1)})
    wanted = ImageClassifier.from_pretrained(embedded_checkpoint())(NAMES, top_k=2)
    for row, predictions in zip(found["predictions"].to_pylist(), wanted, strict=False):
        assert [each["label"] for each in row] == [each.label for each in predictions]
        np.testing.assert_allclose(
            [each["probability"] for each in row],
            [each.probability for each in predictions],
            atol=1e-6,
        )
    assert found.column_names == ["id", "predictions", "error"]
    assert found["predictions"][-1].as_py() is None
    assert classify.compilations == 1


def test_what_does_not_fit_is_refused(embed):
    for run, words in [
        (lambda: embed([NAMES[0]]), "given a list"),
        (lambda: embed({"photo": NAMES}), "given photo"),
        (lambda: ImageFeatures(store_dtype="int8"), "store_dtype"),
        (lambda: ImageFeatures(batch_size=0), "batch_size"),
        (lambda: ImageFeatures(top_k=3), "top_k"),
    ]:
        with pytest.raises((InputError, TypeError), match=words):
            run()
    embed.keep = ["id"]
    try:
        with pytest.raises(InputError, match="`keep` names columns"):
            embed({"file": NAMES})
    finally:
        embed.keep = None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "--on", "ray"], "name it with --output DIR"),
        (["predict", "--on", "ray", "--output", "o", "--json"], "--json does not go with"),
        (["features", "--on", "ray", "--output", "o", "--shard", "1/2"], "--shard does not go"),
        (["features", "--on", "ray", "--output", "o", "--resume"], "--resume does not go"),
        (["features", "--output", "o.npz", "--actors", "2"], "--actors is for --on ray"),
        (["features", "--output", "o.npz", "--ray-address", "auto"], "--ray-address is for"),
        (["features", "--on", "ray", "--output", "o", "--actor-resource", "TPU"], "NAME=N"),
        (["features", "--on", "ray", "--output", "o", "--actor-gpus", "-1"], "must be"),
        (["features", "--on", "ray", "--output", "o"], "pip install 'ray[data]'"),
        (["zeroshot", "--on", "ray", "--output", "o"], "unrecognized arguments: --on"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert vit([arguments[0], NAMES[0], *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_an_actor_gets():
    """A GPU each; all chips of a TPU host; else a machine's cores but one."""
    from vit_cli.runs.ray_run import _actors

    def found(nodes, **options):
        given = {"actor_gpus": None, "actor_cpus": None, "actor_resource": [], "actors": None}
        total: dict[str, float] = {}
        for node in nodes:
            for name, count in node.items():
                total[name] = total.get(name, 0) + count
        ray = SimpleNamespace(
            nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes],
            cluster_resources=lambda: total,
            data=SimpleNamespace(ActorPoolStrategy=lambda size: size),
        )
        return _actors(ray, SimpleNamespace(**{**given, **options}))

    processors = [{"CPU": 8.0}, {"CPU": 4.0}]
    threads = [{"runtime_env": {"env_vars": {"OMP_NUM_THREADS": n}}} for n in "42"]
    assert found(processors) == {"num_cpus": 3, "compute": 2, **threads[0]}
    own = found(processors, actors=5, actor_cpus=2.0)
    assert own == {"num_cpus": 2.0, "compute": 5, **threads[1]}
    graphics = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert found(graphics) == {"num_gpus": 1.0, "compute": 8}
    assert found(graphics, actor_gpus=0.5) == {"num_gpus": 0.5, "compute": 16}
    tensors = [{"CPU": 96.0, "TPU": 4.0}, {"CPU": 96.0, "TPU": 4.0}]
    assert found(tensors) == {"resources": {"TPU": 4.0}, "compute": 2}
    own = found(tensors, actor_resource=[("TPU", 1.0)])
    assert own == {"resources": {"TPU": 1.0}, "compute": 8}
    with pytest.raises(InputError, match="no machine of the cluster"):
        found(processors, actor_gpus=1.0)


def test_images_are_found(tmp_path):
    """In folders, behind URIs and in tables, each once; paths of a table are from its folder."""
    from vit_cli.runs.ray_run import _find

    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        PIL.Image.new("L", (8, 8)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    (tmp_path / "list.csv").write_text("file,label\nphotos/a.png,0\ns3://bucket/c.png,1\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"file": "photos/b.png"}) + "\n")
    pq.write_table(pa.table({"img": ["photos/a.png"]}), tmp_path / "list.parquet")
    held = pa.table({"image": [{"bytes": b"x", "path": "x.png"}]})
    pq.write_table(held, tmp_path / "held.parquet")
    faults: list[str] = []

    def find(*names, column=None):
        return _find([str(name) for name in names], column, faults.append)

    files, tables = find(folder, folder / "a.png", f"file://{folder}")
    places = [f"{folder}/a.png", f"{folder}/b.png"]
    assert files == [(p, p) for p in places] + [(f"file://{p}", f"file://{p}") for p in places]
    assert tables == []
    files, _ = find(tmp_path / "list.csv", tmp_path / "list.jsonl")
    assert files == [
        ("photos/a.png", f"{folder}/a.png"),
        ("s3://bucket/c.png", "s3://bucket/c.png"),
        ("photos/b.png", f"{folder}/b.png"),
    ]
    assert find(tmp_path / "list.parquet") == ([("photos/a.png", f"{folder}/a.png")], [])
    _, tables = find(tmp_path / "held.parquet")
    assert tables == [(str(tmp_path / "held.parquet"), "image")]
    assert not faults
    find(f"file://{tmp_path}/none_of_it", f"file://{tmp_path}")
    (tmp_path / "empty").mkdir()
    find(f"file://{tmp_path}/empty")
    assert len(faults) == 1
    assert "no images" in faults[0]
    for name, words in [
        ("missing.csv", "cannot be read as a table"),
        ("odd://x", "not a URI"),
        ("list.csv", "no column photo"),
    ]:
        place = name if "://" in name else tmp_path / name
        with pytest.raises((InputError, OSError), match=words):
            find(place, column="photo")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_force_replaces_an_output_and_nothing_else(tmp_path, scheme):
    """And only when the new one is about to be written."""
    folder = tmp_path / "out"
    folder.mkdir()
    old = folder / "0_000000_000000.parquet"
    old.write_bytes(b"old")
    name = f"{scheme}{folder}"
    with pytest.raises(ExistingFileError, match="Pass --force"):
        _Output(name, force=False)
    output = _Output(name, force=True)
    assert old.exists()
    with output.written() as place:
        new = Path(place.removeprefix(scheme)) / "1_000000_000000.parquet"
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(b"new")
    assert [each.name for each in folder.iterdir()] == [new.name]
    (folder / "photo.jpg").write_bytes(b"")
    with pytest.raises(ExistingFileError, match=r"holds photo\.jpg, which no earlier output has"):
        _Output(name, force=True)


def test_a_cluster_that_is_not_there():
    from vit_cli.runs.ray_run import _check_answers

    with pytest.raises(HostError, match="cannot be reached"):
        _check_answers("127.0.0.1:1")
    _check_answers("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        _check_answers(f"ray://127.0.0.1:{server.getsockname()[1]}")


# -- with Ray

RAYS_OWN = pytest.mark.filterwarnings("ignore")  # processes it leaves to end by themselves, ...


@pytest.fixture(name="ray", scope="module")
def ray_fixture():
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
    pytest.importorskip("ray.data")
    return ray


def rows_of(output) -> dict[str, dict]:
    rows = pyarrow.dataset.dataset(output, format="parquet").to_table().to_pylist()
    names = [row["file"] for row in rows]
    assert len(set(names)) == len(names), "an image twice"
    return {row["file"]: row for row in rows}


@RAYS_OWN
@pytest.mark.slow
def test_the_command_gives_what_it_gives_without_ray(ray, tmp_path, capsys, monkeypatch, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("\n".join(["file", *NAMES, "nothing.png"]))
    arguments = ["features", "list.csv", "--on", "ray", "--output", "out", "--batch-size", "2"]
    assert vit(arguments) == 1
    assert "wrote out: 13 images; 1 image could not be read" in capsys.readouterr().err
    rows = rows_of("out")
    assert rows.keys() == {*NAMES, "nothing.png"}
    found = np.array([rows[name]["features"] for name in NAMES])
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert "cannot be opened" in rows["nothing.png"]["error"]
    assert vit(arguments) == 2
    assert "already there" in capsys.readouterr().err
    held = pa.table({"image": [{"bytes": Path(n).read_bytes(), "path": n} for n in NAMES]})
    pq.write_table(held, "held.parquet")
    assert vit(["predict", "held.parquet", "--on", "ray", "--output", "out", "--force"]) == 0
    labels = {name: row["predictions"][0]["label"] for name, row in rows_of("out").items()}
    plain = ImageClassifier.from_pretrained(embedded_checkpoint())(NAMES, top_k=1)
    assert labels == {name: each[0].label for name, each in zip(NAMES, plain, strict=True)}
    assert not os.path.exists("out.partial")
    bad = ["predict", NAMES[0], "--on", "ray", "--output", "new"]
    assert vit([*bad, "--model", "no/such/folder"]) == 2
    assert not os.path.exists("new")


@RAYS_OWN
@pytest.mark.slow
def test_an_actor_that_is_killed_comes_back(ray, tmp_path, wanted):
    """Its batches are done again: every image is in the output exactly once."""
    marker = str(tmp_path / "killed")

    class Killed(ImageFeatures):
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            if self.calls == 2 and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), 9)
            return super().__call__(batch)

    files = [f"{i}/{name}" for i in range(4) for name in NAMES]
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        num_cpus=2,
        log_to_driver=False,
    )
    try:
        table = pa.table({"file": files, "source": [name.split("/", 1)[1] for name in files]})
        found = ray.data.from_arrow([table[at : at + 6] for at in range(0, len(files), 6)])
        found = found.map_batches(
            Killed,
            fn_constructor_kwargs={"image": "source", "keep": ["file"], "batch_size": 4},
            batch_size=6,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        found.write_parquet(str(tmp_path / "out"))
    finally:
        ray.shutdown()
    assert os.path.exists(marker)
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == set(files)
    for i, name in enumerate(files):
        np.testing.assert_allclose(rows[name]["features"], wanted[i % len(NAMES)], atol=2e-6)


@RAYS_OWN
@pytest.mark.slow
def test_the_example_runs(ray, tmp_path):
    script = Path(__file__).parents[1] / "examples/ray_features.py"
    arguments = [str(embedded_checkpoint() / "images"), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("12 rows with the columns path, features, error\n")
