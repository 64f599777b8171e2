"""`vit search` and `ImageIndex`: the neighbours are scikit-learn's and numpy's."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file
from sklearn.neighbors import NearestNeighbors

import vit_flax.inference.search as search_module
from vit_cli.main import main
from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_common.errors import CheckpointError, InputError, MissingFileError
from vit_flax.inference import ImageEncoder, ImageIndex

HAS_FAISS = importlib.util.find_spec("faiss") is not None
FAISS = pytest.param(
    True, marks=pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed"), id="faiss"
)
SUFFIXES = [".npz", ".safetensors", ".parquet"]


def rng(seed=0):
    return np.random.default_rng(seed)


def unit(array):
    wide = np.asarray(array, np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Some 40 blocks."""
    monkeypatch.setattr(search_module, "_BLOCK_BYTES", 4 * 24 * 50)


# -- the search


@pytest.mark.parametrize("faiss", [pytest.param(False, id="numpy"), FAISS])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_neighbours_are_those_of_scikit_learn(dtype, faiss, small_blocks):
    features = rng().normal(size=(2000, 24)).astype(dtype)
    queries = np.concatenate([rng(1).normal(size=(5, 24)).astype(dtype), features[77:78]])
    wanted = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute")
    distances, places = wanted.fit(unit(features)).kneighbors(unit(queries))
    found = ImageIndex(features).search(queries, top=20, faiss=faiss)
    assert [[near.index for near in row] for row in found] == places.tolist()
    similarities = [[near.similarity for near in row] for row in found]
    np.testing.assert_allclose(similarities, 1.0 - distances, rtol=0, atol=1e-12)
    assert found[5][0].file == "77"


@pytest.mark.parametrize("faiss", [pytest.param(False, id="numpy"), FAISS])
def test_vectors_nearer_to_each_other_than_float32_can_tell(faiss, small_blocks):
    """The order is that of extended precision; of equal ones the first comes first, in whichever
    block they are."""
    base = rng().normal(size=24)
    features = base + 1e-5 * rng(1).normal(size=(1000, 24))
    features[900:950] = features[:50]
    features[950:] = 2 * features[:50]
    wide = features.astype(np.longdouble)
    exact = (wide * base).sum(1) / np.sqrt((wide * wide).sum(1) * (base * base).sum())
    assert len({*exact.astype(np.float32)}) < 10  # float32 cannot tell them apart
    found = ImageIndex(features).search(base[None], top=60, faiss=faiss)[0]
    order = np.argsort(-exact, kind="stable")[:60]
    assert [near.index for near in found] == order.tolist()
    assert {*order} & {*range(50)}
    assert {*order} & {*range(900, 950)}


@pytest.mark.parametrize("faiss", [pytest.param(False, id="numpy"), FAISS])
def test_equal_images_come_in_their_order(faiss, small_blocks):
    features = np.tile(rng().normal(size=(1, 24)).astype(np.float32), (500, 1))
    found = ImageIndex(features).search(features[:2], top=7, faiss=faiss)
    assert [[near.index for near in row] for row in found] == [[*range(7)]] * 2


def test_rows_without_a_direction_are_passed_over(small_blocks):
    features = rng().normal(size=(300, 24)).astype(np.float32)
    features[3], features[200] = 0.0, np.nan
    features[201, 5] = np.inf
    features[10] *= np.float32(1e-30)
    features[11] *= np.float32(1e30)
    index = ImageIndex(features, [f"{i}.png" for i in range(300)])
    with pytest.warns(UserWarning, match=r"the index: 3 of 300 rows .* the first is 3\.png\."):
        found = index.search(features[10:12], top=300)
    assert (found[0][0].index, found[1][0].index) == (10, 11)
    good = [i for i in range(300) if i not in (3, 200, 201)]
    wanted = unit(features[good]) @ unit(features[[10]])[0]
    assert sorted(near.index for near in found[0]) == good
    np.testing.assert_allclose(
        [near.similarity for near in found[0]], np.sort(wanted)[::-1], rtol=0, atol=1e-12
    )


def test_what_does_not_fit_is_refused():
    index = ImageIndex(np.ones((3, 4), np.float32))
    with pytest.raises(InputError, match=r"each of its images has features 4; given queries of 5"):
        index.search(np.ones((1, 5), np.float32))
    with pytest.raises(InputError, match=r"given queries of 4 \(int64\)"):
        index.search(np.ones((1, 4), np.int64))
    with pytest.raises(InputError, match="query 1 holds no direction"):
        index.search(np.array([[1.0] * 4, [np.nan] * 4]))
    with pytest.raises(InputError, match="`top` must be"):
        index.search(np.ones((1, 4)), top=0)
    with pytest.raises(InputError, match="holds no features"):
        ImageIndex(np.ones((0, 4), np.float32)).search(np.ones((1, 4)))
    with pytest.raises(InputError, match="`files` must name each of 3 images; given 2"):
        ImageIndex(np.ones((3, 4), np.float32), ["a", "b"])
    with pytest.raises(InputError, match=r"array \(images, \.\.\.\) of floats"):
        ImageIndex(np.ones(4))
    with pytest.raises(InputError, match="`features` must be an array of floats"):
        ImageIndex([[1.0, 2.0], [1.0]])
    with pytest.raises(InputError, match="`queries` must be an array of floats"):
        index.search([[1.0, 2.0], [1.0]])
    for files in ("abc", 3):
        with pytest.raises(InputError, match="`files` must be a list of names"):
            ImageIndex(np.ones((3, 4), np.float32), files)
    assert index.vector(2).tolist() == [1.0] * 4
    for bad in (-1, 3, True, 1.0, "a"):
        with pytest.raises(InputError, match="`index` must be an integer from 0 to 2"):
            index.vector(bad)


# -- files


def write(path, features, files, made_with=None):
    """A file of features by the libraries that users have."""
    if path.suffix == ".npz":
        more = {} if made_with is None else {"made_with": np.array(json.dumps(made_with))}
        np.savez(path, features=features, files=np.array(files, str), **more)
    elif path.suffix == ".safetensors":
        more = {} if made_with is None else {"made_with": json.dumps(made_with)}
        save_file({"features": features}, path, {"files": json.dumps(files), **more})
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        width = int(np.prod(features.shape[1:]))
        column = pa.FixedSizeListArray.from_arrays(features.reshape(-1), width)
        more = {} if made_with is None else {"made_with": json.dumps(made_with)}
        more["shape"] = json.dumps(features.shape[1:])
        table = pa.table({"file": files, "features": column}).replace_schema_metadata(more)
        pq.write_table(table, path, row_group_size=7)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_files_of_the_libraries(tmp_path, suffix, dtype, small_blocks):
    features = rng().normal(size=(120, 2, 12)).astype(dtype)
    files = [f"{'x' * (i % 5)}-{i}-写.png" for i in range(120)]
    path = write(tmp_path / f"f{suffix}", features, files, {"pool": "cls"})
    with ImageIndex.open(path) as index:
        assert (len(index), index.shape, index.made_with) == (120, (120, 2, 12), {"pool": "cls"})
        assert [*index.files] == files
        np.testing.assert_array_equal(index.vector(101), features[101])
        found = index.search(features[50:52], top=4)
    wanted = ImageIndex(features, files).search(features[50:52], top=4)
    assert found == wanted
    assert found[0][0].file == files[50]


def test_a_name_that_is_not_unicode(tmp_path):
    path = tmp_path / "f.npz"
    names = np.array(["ab", "cd"])
    np.savez(path, features=np.eye(2, 4, dtype=np.float32), files=names)
    broken = names.view(np.uint32).copy()
    broken[1] = 0x7FFFFFFF
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(names.tobytes(), broken.tobytes()))
    with (
        ImageIndex.open(path) as index,
        pytest.raises(CheckpointError, match=r"f\.npz: text 0 is not Unicode"),
    ):
        index.search(np.ones((1, 4), np.float32))


def test_a_compressed_file(tmp_path):
    features = rng().normal(size=(30, 8)).astype(np.float32)
    files = np.array([f"{i}.png" for i in range(30)])
    np.savez_compressed(tmp_path / "f.npz", features=features, files=files)
    with ImageIndex.open(tmp_path / "f.npz") as index:
        assert index.search(features[4:5])[0][0].file == "4.png"
        assert index.made_with == {}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_memory_is_that_of_a_block(tmp_path, suffix, monkeypatch):
    features = rng().integers(-9, 9, (20_000, 128)).astype(np.float16)  # 5 MB
    path = write(tmp_path / f"f{suffix}", features, [str(i) for i in range(20_000)])
    query = features[:1].copy()
    wanted = [near.index for near in ImageIndex(features).search(query)[0]]
    del features
    monkeypatch.setattr(search_module, "_BLOCK_BYTES", 1 << 18)
    with ImageIndex.open(path) as index:
        tracemalloc.start()
        found = index.search(query)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [near.index for near in found[0]] == wanted
    assert peak < 2e6


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_broken_files(tmp_path, suffix):
    """Cut off, bent or of something else: one error of ours, whatever the byte."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    features = rng().normal(size=(20, 8)).astype(np.float32)
    path = write(tmp_path / f"f{suffix}", features, list(map(str, range(20))), {"pool": "cls"})
    whole = path.read_bytes()
    for seed in range(60):
        data = bytearray(whole)
        if seed % 2:
            data = data[: int(rng(seed).integers(0, len(data)))]
        else:
            for place in rng(seed).integers(0, len(data), 8):
                data[place] ^= 0x55
        path.write_bytes(data)
        try:
            with ImageIndex.open(path) as index:
                index.search(np.ones((1, *index.shape[1:]), np.float32), top=3)
                list(index.files)
        except (InputError, CheckpointError):
            pass
        except UserWarning:  # a vector of NaN
            pass
    with pytest.raises(MissingFileError, match="no such file; `vit features"):
        ImageIndex.open(tmp_path / f"none{suffix}")
    with pytest.raises(InputError, match=r"ends in \.npz"):
        ImageIndex.open(tmp_path / "f.txt")


def test_files_of_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.ones((3, 4)))
    with pytest.raises(InputError, match=r"a\.npz: holds no `features`; it holds weights"):
        ImageIndex.open(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", features=np.ones((3, 4)))
    with pytest.raises(InputError, match="holds no `files`"):
        ImageIndex.open(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", features=np.ones((3, 4)), files=np.array(["a"]))
    with pytest.raises(InputError, match="holds 3 vectors, but names 1 images"):
        ImageIndex.open(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", features=np.ones((3, 4), int), files=np.array(list("abc")))
    with pytest.raises(InputError, match="must be of floats; given int64"):
        ImageIndex.open(tmp_path / "d.npz")


# -- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The digits, and their features in each format."""
    here = tmp_path_factory.mktemp("search")
    (here / "photos").mkdir()
    for path in embedded_images():
        shutil.copy(path, here / "photos" / path.name)
    encode = ImageEncoder.from_pretrained(embedded_checkpoint())
    files = sorted(map(str, (here / "photos").iterdir()))
    made_with = {
        "model": None,
        "revision": None,
        "subfolder": None,
        "dtype": "float32",
        "shard": None,
        "layers": [-1],
        "pool": "cls",
        "store_dtype": "float32",
    }
    features = encode.features(files)
    for suffix in SUFFIXES if importlib.util.find_spec("pyarrow") else SUFFIXES[:2]:
        write(here / f"f{suffix}", features, files, made_with)
    return here, encode, files, features, made_with


@pytest.fixture
def loaded(place, monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return place[1]

    monkeypatch.setattr(ImageEncoder, "from_pretrained", from_pretrained)
    return asked


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_command(place, loaded, capsys, suffix):
    here, _, files, features, _ = place
    index = here / f"f{suffix}"
    if not index.exists():
        pytest.skip("pyarrow is not installed")
    wanted = NearestNeighbors(n_neighbors=3, metric="cosine").fit(features.astype(np.float64))
    distances, places = wanted.kneighbors(features[:2].astype(np.float64))
    asked = [files[0], files[1], "--index", str(index), "--top", "3"]
    assert main(["search", *asked, "--json"]) == 0
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [row["file"] for row in rows] == files[:2]
    assert [[n["index"] for n in row["neighbours"]] for row in rows] == places.tolist()
    assert [[n["file"] for n in row["neighbours"]] for row in rows] == [
        [files[i] for i in row] for row in places
    ]
    np.testing.assert_allclose(
        [[n["similarity"] for n in row["neighbours"]] for row in rows], 1 - distances, atol=1e-6
    )
    assert main(["search", *asked]) == 0
    first = capsys.readouterr().out.splitlines()[1]
    assert first == f"{files[0]}  {1 - distances[0, 1]:7.4f}  {files[places[0, 1]]}"
    assert loaded[0][0] == str(embedded_checkpoint())


def test_a_sheet(place, loaded, tmp_path, capsys):
    """Its tiles are the photos; one that is gone is grey, and said."""
    _, _, files, features, made_with = place
    kept = [*files[:3], str(tmp_path / "gone.png")]
    write(tmp_path / "f.npz", features[:4], kept, made_with)
    sheet = tmp_path / "sheet.png"
    arguments = ["search", files[0], files[3], "--index", str(tmp_path / "f.npz"), "--top", "2"]
    assert main([*arguments, "--output", str(sheet)]) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"vit: wrote {sheet}: 2 x 2 images; 1 images cannot be shown, the first is {kept[3]}\n"
    )
    pixels = np.asarray(PIL.Image.open(sheet).convert("L"))
    photo = np.asarray(PIL.Image.open(files[0]).convert("L"))
    large = photo.repeat(20, axis=0).repeat(20, axis=1)
    np.testing.assert_array_equal(pixels[:160, :160], large)
    np.testing.assert_array_equal(pixels[:160, 166:326], large)  # itself is the nearest
    assert (pixels[186:346, 166:326] == 226).all()
    before = sheet.read_bytes()
    assert main([*arguments, "--output", str(sheet)]) == 2
    assert sheet.read_bytes() == before
    assert main([*arguments, "--output", str(sheet), "--force", "-q"]) == 0
    assert main([*arguments, "--output", str(tmp_path / "sheet.txt")]) == 2


def test_bad_photos(place, loaded, tmp_path, capsys):
    here, _, files, *_ = place
    (tmp_path / "bad.png").write_bytes(b"no image")
    arguments = [str(tmp_path / "bad.png"), files[1], "--index", str(here / "f.npz"), "--top", "1"]
    assert main(["search", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == f"{files[1]}   1.0000  {files[1]}\n"
    assert said.err.startswith(f"vit: error: {tmp_path}/bad.png: not an image")
    (tmp_path / "none").mkdir()
    assert main(["search", str(tmp_path / "none"), "--index", str(here / "f.npz")]) == 1


def refusals(place, tmp_path):
    here, _, files, features, made_with = place
    layers = np.stack([features, features], axis=1)

    def index(name, array=features, names=files, **changed):
        return write(tmp_path / f"{name}.npz", array, names, {**made_with, **changed})

    unsaid = write(tmp_path / "unsaid.npz", features, files)
    gone = [f"{name}.gone" for name in files]
    return [
        ([here / "f.npz", "--pool", "mean"], "--pool: .* was made with cls; given mean"),
        ([here / "f.npz", "--layers", "0"], "--layers: .* was made with -1; given 0"),
        ([index("tokens", pool=None)], "holds all tokens of each image; wanted one vector"),
        ([index("deep", layers, layers=[-1])], "holds features of 2 x 48 per image; .* gives 48"),
        ([index("wide", features[:, :40])], "holds features of 40 per image; .* gives 48"),
        ([index("empty", features[:0], [])], "holds no features, so there is nothing to find"),
        ([unsaid], "does not say which model made it; name that with --model"),
        ([index("odd", layers="all")], "has the layers 'all'; wanted numbers of blocks"),
        ([index("strange", model=3)], "names the model 3; wanted its name"),
        ([index("other", -features, model="a/b"), "--model", "c/d"], "cosine -1.00, wanted 1.00"),
        ([index("missing", names=gone, model="a/b"), "--model", "c/d"], "its images are not here"),
    ]


def test_refusals(place, loaded, tmp_path, capsys):
    """One line each; the last is a warning, as nothing is known to be wrong."""
    *refused, warned = refusals(place, tmp_path)
    photo = place[2][0]
    for (index, *options), text in refused:
        assert main(["search", photo, "--index", str(index), *options]) == 2, text
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert re.search(text, said.err)
    (index, *options), text = warned
    assert main(["search", photo, "--index", str(index), *options, "--top", "1"]) == 0
    assert text in capsys.readouterr().err


def test_another_name_of_the_same_model_is_taken(place, loaded, tmp_path, capsys):
    _, _, files, features, made_with = place
    index = write(tmp_path / "f.npz", features, files, {**made_with, "model": "old/place"})
    arguments = ["search", files[0], "--index", str(index), "--top", "1", "--model", "new"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    index = write(tmp_path / "g.npz", features, files)
    assert main(["search", files[0], "--index", str(index), "--model", "new", "-q"]) == 0


def test_the_index_says_how_its_model_is_read(place, loaded, tmp_path):
    _, _, files, features, made_with = place
    how = {
        "dtype": "bfloat16",
        "revision": "v1",
        "format": "dino",
        "image_size": 8,
        "num_attention_heads": 4,
        "weights": "int8",
    }
    index = write(tmp_path / "f.npz", features, files, {**made_with, "model": "a/b", **how})
    wanted = ("a/b", {**how, "mesh": None})
    assert main(["search", files[0], "--index", str(index), "-q"]) == 0
    # A name that the index has too does not make the rest of what it says untrue.
    assert main(["search", files[0], "--index", str(index), "-q", "--model", "a/b"]) == 0
    assert loaded == [wanted, wanted]


def test_a_model_that_moved(place, tmp_path, capsys):
    _, _, files, features, made_with = place
    index = write(tmp_path / "f.npz", features, files, {**made_with, "model": "/no/such/model"})
    assert main(["search", files[0], "--index", str(index)]) == 2
    said = capsys.readouterr().err
    assert f"It made {index}; --model says where it is now." in said
    assert len(said.splitlines()) == 1


def test_what_features_writes_is_what_search_reads(place, tmp_path, capsys, loaded):
    """The whole way; the settings that the file names are enough."""
    files = place[2]
    for suffix in (".npz", ".safetensors"):
        path = str(tmp_path / f"f{suffix}")
        assert main(["features", *files, "--output", path, "-q", "--pool", "mean"]) == 0
        assert main(["search", files[5], "--index", path, "--top", "1"]) == 0
        assert capsys.readouterr().out == f"{files[5]}   1.0000  {files[5]}\n"
    assert Path(path).exists()
