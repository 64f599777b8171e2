"""Directories, files and Hub names, against a small Hub on loopback that really is asked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from hub_server import HubServer, Repository, hub_server
from huggingface_hub import constants, file_download

from vit_common.embedded import embedded_checkpoint
from vit_common.errors import CheckpointError, InputError, MissingFileError
from vit_common.files.cards import ModelCard
from vit_common.files.checkpoint import open_checkpoint, save_checkpoint
from vit_common.files.hub import (
    HUB_OPTIONS,
    WEIGHTS,
    AbsentFileError,
    find_file,
    find_weights,
    push_folder,
    push_if_asked,
    split_hub_options,
)
from vit_common.files.replace import make_directory
from vit_convert import convert
from vit_convert.source import read_config_file

CONFIG = b'{"model_type": "vit"}\n'
ARRAYS = {f"w{i}": np.random.default_rng(i).standard_normal((20, 30)) for i in range(4)}
WEIGHT_BYTES = safetensors.numpy.save(ARRAYS)


def _point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As HF_ENDPOINT, which huggingface_hub reads when it is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def waits() -> list[float]:
    """The seconds that huggingface_hub would have waited, each time it would."""
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubServer]:
    """A running Hub, an empty cache, no login, and huggingface_hub pointed at all three."""
    with hub_server() as server:
        _point_at(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # Between its attempts the library waits, for seconds; here it is only noted how long.
        monkeypatch.setattr(time, "sleep", waits.append)
        yield server


def _one_line(info: pytest.ExceptionInfo) -> str:
    text = str(info.value)
    assert "\n" not in text
    assert len(text) < 500
    assert "Traceback" not in text
    return text


# -- options


def test_options_of_the_hub_are_parted_from_the_rest() -> None:
    wanted = {"revision": "v1", "token": False, "cache_dir": "c"}
    without_effect = {"resume_download": True, "trust_remote_code": True, "mirror": "m"}
    without_effect |= {"_from_auto": True, "_from_pipeline": None, "_commit_hash": "abc"}
    unset = {"subfolder": None, "proxies": None, "use_auth_token": None}
    given = wanted | without_effect | unset | {"dtype": "f", "num_labels": 3}
    before = dict(given)
    hub, rest = split_hub_options(given)
    assert hub == wanted
    assert rest == {"dtype": "f", "num_labels": 3}
    assert given == before
    assert set(HUB_OPTIONS) >= {*hub, "subfolder", "local_files_only", "force_download"}


def test_the_older_name_of_token() -> None:
    assert split_hub_options({"use_auth_token": "a"}) == ({"token": "a"}, {})
    assert split_hub_options({"use_auth_token": "a", "token": "a"}) == ({"token": "a"}, {})
    with pytest.raises(InputError, match="`token` and `use_auth_token` were both given"):
        split_hub_options({"use_auth_token": "a", "token": "b"})


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown option 'revison'; wanted one of revision"):
        find_file(tmp_path, "config.json", revison="v1")


# -- directories and files


def test_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_bytes(CONFIG)
    (tmp_path / "sub" / "other.json").write_bytes(CONFIG)
    (tmp_path / "sub" / "x.safetensors").write_bytes(WEIGHT_BYTES)
    wanted = tmp_path / "sub" / "config.json"
    assert find_file(tmp_path / "sub", "config.json") == wanted
    assert find_file(str(tmp_path), "config.json", subfolder="sub", token=None) == wanted
    assert find_file(tmp_path / "sub" / "other.json", "config.json").name == "other.json"
    assert find_file(tmp_path / "sub" / "x.safetensors", "config.json") == wanted
    index = tmp_path / "sub" / "model.safetensors.index.json"
    index.write_text("{}")
    assert find_file(index, "config.json") == wanted
    with pytest.raises(MissingFileError, match=r"config\.json: no such file; there is sub\."):
        find_file(tmp_path, "config.json")
    with pytest.raises(MissingFileError, match="nowhere: no such directory"):
        find_file(tmp_path, "config.json", subfolder="nowhere")


@pytest.mark.parametrize(
    "name",
    [
        *("./model", "../model", "/no/such/model", "~/model", "model/", "a/b/c", "a\\b", "C:\\a"),
        *("model.safetensors", "owner/model.bin", ".", "x" * 5000 + "/"),
    ],
)
def test_a_path_that_is_not_there_does_not_ask_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = "no such file" if name != "." else r"config\.json: no such file; there is nothing"
    with pytest.raises(MissingFileError, match=message):
        find_file(name, "config.json")
    assert hub.seen == []


@pytest.mark.parametrize("name", ["a b", "owner/na me", "owner/name@", "@v1", "ü/ö?", "a\x00b"])
def test_what_is_no_name_at_all(hub: HubServer, name: str) -> None:
    with pytest.raises(MissingFileError, match="neither a file or directory here nor a Hub name"):
        find_file(name, "config.json")
    assert hub.seen == []


def test_an_empty_name_is_refused() -> None:
    for name in ("", b"bytes"):
        with pytest.raises(InputError, match="must be a path or a Hub name; given"):
            find_file(name, "config.json")  # type: ignore[arg-type]


def test_weights_of_a_directory_in_their_order(tmp_path: Path) -> None:
    for name in reversed(WEIGHTS):
        (tmp_path / name).write_bytes(b"{}")
        os.utime(tmp_path / name, (1000, 1000))
        assert find_weights(tmp_path) == tmp_path / name
    preferred = ("pytorch_model.bin", "nowhere.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_weights(tmp_path, prefer=preferred).name == "pytorch_model.bin"
    assert find_weights(tmp_path / "flax_model.msgpack").name == "flax_model.msgpack"


def test_weights_older_than_others_are_named(tmp_path: Path) -> None:
    for name, age in (("model.safetensors", 10), ("flax_model.msgpack", 12)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (age, age))
    with pytest.warns(UserWarning, match=r"model\.safetensors is used, but flax_model\.msgpack is"):
        assert find_weights(tmp_path).name == "model.safetensors"
    os.utime(tmp_path / "flax_model.msgpack", (10.5, 10.5))
    assert find_weights(tmp_path).name == "model.safetensors"


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(MissingFileError) as info:
        find_weights(tmp_path)
    text = str(info.value)
    assert all(name in text for name in WEIGHTS)
    assert "there is tf_model.h5." in text


# -- downloads


def test_a_file_is_downloaded_once(hub: HubServer) -> None:
    hub.add("owner/name", {"config.json": CONFIG, "model.safetensors": WEIGHT_BYTES})
    path = find_file("owner/name", "config.json")
    assert path.read_bytes() == CONFIG
    assert find_file("owner/name", "config.json") == path
    assert len(hub.asked("GET", "config.json")) == 1
    weights = find_weights("owner/name")
    assert weights.read_bytes() == WEIGHT_BYTES
    with open_checkpoint(weights) as checkpoint:
        np.testing.assert_array_equal(checkpoint["w2"].read(), ARRAYS["w2"])


def test_a_name_without_owner(hub: HubServer) -> None:
    hub.add("vit", {"config.json": CONFIG})
    assert find_file("vit", "config.json").read_bytes() == CONFIG


def test_a_directory_comes_before_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/name", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_bytes(CONFIG)
    assert find_file("owner/name", "config.json").read_bytes() == CONFIG
    assert hub.seen == []


def test_without_the_server_the_cache_is_used(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    hub.add("owner/name", {"config.json": CONFIG, "flax_model.msgpack": b"\x80"})
    first, second = find_file("owner/name", "config.json"), find_weights("owner/name")
    _point_at(monkeypatch, "http://127.0.0.1:9")
    count = len(hub.seen)
    assert find_file("owner/name", "config.json") == first
    assert find_weights("owner/name") == second
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "other.json")
    assert _one_line(info) == (
        "owner/name: no such file or folder here; other.json of that repository on the Hub "
        "(revision main) is not in the cache, and http://127.0.0.1:9 cannot be reached "
        "(Connection refused)."
    )
    with pytest.raises(MissingFileError, match=r"model\.safetensors .* not in the cache, and"):
        find_weights("owner/other")
    assert len(hub.seen) == count
    assert waits == []


def test_a_broken_hub_is_asked_once(hub: HubServer, waits: list[float]) -> None:
    repository = hub.add("owner/name", {"a/pytorch_model.bin": b"x", "a/config.json": CONFIG})
    weights = find_weights("owner/name", subfolder="a")
    repository.commit({"a/config.json": b"{}"})
    find_file("owner/name", "config.json", subfolder="a", revision=repository.refs["main"])
    hub.status["*"] = 500
    hub.seen.clear()
    assert find_weights("owner/name", subfolder="a") == weights
    with pytest.raises(MissingFileError, match=r"model\.safetensors .* the Hub answers 500"):
        find_weights("owner/name", subfolder="b", force_download=False)
    assert len(hub.seen) == 2
    assert waits == []


def test_a_hub_that_never_answers(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _point_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(MissingFileError, match=r"cannot be reached \(.*timed out") as info:
            find_weights("owner/name")
        _one_line(info)
        assert time.monotonic() - start < 10


def test_what_a_repository_lacks_is_remembered(hub: HubServer) -> None:
    hub.add("owner/name", {"a/config.json": CONFIG})
    options: dict[str, Any] = {"subfolder": "a"}
    for _ in range(2):
        with pytest.raises(AbsentFileError, match=r"ha[sd] no file other\.json"):
            find_file("owner/name", "other.json", **options)
        options["local_files_only"] = True


def test_local_files_only(hub: HubServer) -> None:
    hub.add("owner/name", {"config.json": CONFIG, "pytorch_model.bin": b"x"})
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "config.json", local_files_only=True)
    assert "not in the cache, and `local_files_only=True` was given" in _one_line(info)
    with pytest.raises(MissingFileError, match="local_files_only"):
        find_weights("owner/name", local_files_only=True)
    assert hub.seen == []
    path = find_file("owner/name", "config.json")
    weights = find_weights("owner/name")
    count = len(hub.seen)
    assert find_file("owner/name", "config.json", local_files_only=True) == path
    assert find_weights("owner/name", local_files_only=True) == weights
    assert len(hub.seen) == count


def test_offline_mode(hub: HubServer) -> None:
    hub.add("owner/name", {"config.json": CONFIG})
    path = find_file("owner/name", "config.json")
    code = (
        "import sys; from vit_common.files.hub import find_file\n"
        "from vit_common.errors import MissingFileError\n"
        "print(find_file('owner/name', 'config.json'))\n"
        "try: find_file('owner/name', 'other.json')\n"
        "except MissingFileError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    environment["HF_HUB_CACHE"] = constants.HF_HUB_CACHE
    count = len(hub.seen)
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()
    assert Path(out[0]) == path
    assert out[1] == (
        "owner/name: no such file or folder here; other.json of that repository on the Hub "
        "(revision main) is not in the cache, and HF_HUB_OFFLINE keeps it from the network."
    )
    assert len(hub.seen) == count


def test_the_environment_is_honoured_and_nothing_is_imported_early(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add("owner/name", {"config.json": CONFIG})
    code = (
        "import sys; from vit_common.files.hub import find_file\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "find_file('.', 'here')\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "print(find_file('owner/name', 'config.json'))\n"
    )
    (tmp_path / "here").write_text("")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_me"}
    environment |= {"PYTHONPATH": os.getcwd(), "HF_HUB_DISABLE_XET": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    path = Path(out.stdout.strip())
    assert path.read_bytes() == CONFIG
    assert (tmp_path / "home") in path.parents
    assert hub.asked("HEAD")[0][1]["authorization"] == "Bearer hf_me"


def test_revisions(hub: HubServer) -> None:
    repository = hub.add("owner/name", {"config.json": b"1"})
    commit = repository.commit({"config.json": b"2"}, "v1.0")
    repository.commit({"config.json": b"3"}, "refs/pr/1")
    assert find_file("owner/name", "config.json").read_bytes() == b"1"
    assert find_file("owner/name", "config.json", revision="v1.0").read_bytes() == b"2"
    assert find_file("owner/name@v1.0", "config.json").read_bytes() == b"2"
    assert find_file("owner/name@v1.0", "config.json", revision="v1.0").read_bytes() == b"2"
    assert find_file(f"owner/name@{commit}", "config.json").read_bytes() == b"2"
    assert find_file("owner/name@refs/pr/1", "config.json").read_bytes() == b"3"
    with pytest.raises(InputError, match=r"two revisions were given: 'v1\.0' in .*='main'"):
        find_file("owner/name@v1.0", "config.json", revision="main")
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name@v9", "config.json")
    assert _one_line(info) == "owner/name: the Hub has this repository, but no 'v9' in it."


def test_a_new_commit_is_fetched(hub: HubServer) -> None:
    repository = hub.add("owner/name", {"config.json": b"1"})
    assert find_file("owner/name", "config.json").read_bytes() == b"1"
    repository.commit({"config.json": b"2"})
    assert find_file("owner/name", "config.json").read_bytes() == b"2"


def test_subfolder_cache_and_forced_download(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/name", {"a/b/config.json": CONFIG, "a/b/model.safetensors": WEIGHT_BYTES})
    options = {"subfolder": "a/b", "cache_dir": tmp_path / "mine"}
    path = find_file("owner/name", "config.json", **options)
    assert path.read_bytes() == CONFIG
    assert (tmp_path / "mine") in path.parents
    assert find_weights("owner/name", **options).read_bytes() == WEIGHT_BYTES
    find_file("owner/name", "config.json", **options, force_download=True)
    assert len(hub.asked("GET", "config.json")) == 2


def test_a_token_is_sent(hub: HubServer) -> None:
    hub.add("owner/private", {"config.json": CONFIG}, token="hf_right")
    hub.add("owner/open", {"config.json": CONFIG})
    assert find_file("owner/private", "config.json", token="hf_right").read_bytes() == CONFIG
    assert {headers.get("authorization") for _, _, headers in hub.seen} == {"Bearer hf_right"}
    hub.seen.clear()
    find_file("owner/open", "config.json", token=False)
    assert {headers.get("authorization") for _, _, headers in hub.seen} == {None}
    for token in (None, "hf_wrong"):
        with pytest.raises(MissingFileError, match=r"nor a repository on the Hub.*hf auth login"):
            find_file("owner/private", "other.json", token=token)
    with pytest.raises(MissingFileError, match="`token=True` was given, but nobody is logged in"):
        find_file("owner/open", "other.json", token=True)


def test_proxies_are_passed_on_or_said_to_be_unused(hub: HubServer) -> None:
    hub.add("owner/name", {"config.json": CONFIG})
    proxies = {"http": hub.url}
    if huggingface_hub.__version__.startswith("0."):
        assert find_file("owner/name", "config.json", proxies=proxies).read_bytes() == CONFIG
    else:
        with pytest.warns(UserWarning, match="`proxies` is not used"):
            find_file("owner/name", "config.json", proxies=proxies)


# -- refusals and faults


def test_an_unknown_repository(hub: HubServer) -> None:
    for options in ({}, {"token": "hf_me"}):
        with pytest.raises(MissingFileError) as info:
            find_weights("owner/nobody", **options)
        assert _one_line(info) == (
            "owner/nobody: neither a file or directory here nor a repository on the Hub; check the "
            "spelling, or if it is private, log in with `hf auth login` or pass `token=`."
        )
    with pytest.raises(MissingFileError, match=r"vit-base: neither .* nor a repository"):
        find_file("vit-base", "config.json")
    with pytest.raises(
        MissingFileError, match=r"a--b' is neither a file or directory here nor a Hub"
    ):
        find_file("owner/a--b", "config.json")


def test_a_missing_file_in_a_repository(hub: HubServer) -> None:
    hub.add("owner/name", {"config.json": CONFIG, "tf_model.h5": b""})
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "other.json")
    assert _one_line(info) == "owner/name on the Hub has no file other.json (revision main)."
    with pytest.raises(MissingFileError) as found:
        find_weights("owner/name")
    assert "owner/name on the Hub has no weights (revision main)" in str(found.value)
    assert all(name in str(found.value) for name in WEIGHTS)
    assert str(found.value).endswith("there is config.json, tf_model.h5.")


def test_a_gated_repository(hub: HubServer) -> None:
    hub.add("owner/gated", {"model.safetensors": WEIGHT_BYTES}, token="hf_yes", gated=True)
    for options in ({}, {"token": "hf_no"}):
        with pytest.raises(MissingFileError) as info:
            find_weights("owner/gated", **options)
        assert _one_line(info) == (
            f"owner/gated: access on the Hub is restricted; accept its conditions at "
            f"{hub.url}/owner/gated, then log in with `hf auth login` or pass `token=`."
        )
    assert find_weights("owner/gated", token="hf_yes").read_bytes() == WEIGHT_BYTES


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal(hub: HubServer, status: int) -> None:
    hub.add("owner/name", {"config.json": CONFIG})
    hub.status["*"] = status
    with pytest.raises(MissingFileError, match="hf auth login") as info:
        find_file("owner/name", "config.json")
    _one_line(info)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_broken_hub(hub: HubServer, status: int) -> None:
    hub.add("owner/name", {"config.json": CONFIG})
    hub.status["config.json"] = status
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "config.json")
    assert f"not in the cache, and the Hub answers {status}; try again later" in _one_line(info)
    del hub.status["config.json"]
    path = find_file("owner/name", "config.json")
    hub.status["*"] = status
    assert find_file("owner/name", "config.json") == path


def test_a_dropped_connection_and_a_second_attempt(hub: HubServer) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    hub.add("owner/name", {"model.safetensors": data, "flax_model.msgpack": b"\x80"})
    find_weights("owner/name", prefer=("flax_model.msgpack",))  # must not be taken instead
    hub.drop["model.safetensors"] = 1_000_000
    hub.drop_after = 0
    start = time.monotonic()
    with pytest.raises(MissingFileError) as info:
        find_weights("owner/name")
    assert time.monotonic() - start < 20
    text = _one_line(info)
    assert text.startswith(f"owner/name: model.safetensors could not be downloaded from {hub.url}")
    assert text.endswith("what arrived is kept, run it again to go on.")
    hub.drop["model.safetensors"] = 0
    assert find_weights("owner/name").read_bytes() == data


def test_a_download_goes_on_where_it_was_cut_off(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # a real one is 10 MB
    data = np.random.default_rng(1).bytes(100_000)
    hub.add("owner/name", {"model.safetensors": data})
    hub.drop["model.safetensors"] = 2
    hub.drop_after = 30_000
    for _ in range(3):  # 0.x gives up at once, later versions go on by themselves
        try:
            path = find_weights("owner/name")
            break
        except MissingFileError:
            continue
    assert path.read_bytes() == data
    ranges = [headers.get("range") for _, headers in hub.asked("GET")]
    assert ranges == [None, "bytes=30000-", "bytes=60000-"]


def test_an_older_copy_is_named_where_the_new_one_does_not_come(hub: HubServer) -> None:
    repository = hub.add("owner/name", {"config.json": b"old" * 100})
    commit = repository.refs["main"]
    find_file("owner/name", "config.json")
    repository.commit({"config.json": b"new" * 100})
    hub.drop["config.json"], hub.drop_after = 1_000_000, 0
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "config.json")
    assert f"from another revision: pass `revision='{commit}'`" in _one_line(info)
    assert find_file("owner/name", "config.json", revision=commit).read_bytes() == b"old" * 100


def test_force_download_without_a_network(hub: HubServer) -> None:
    hub.add("owner/name", {"config.json": CONFIG})
    find_file("owner/name", "config.json")
    hub.status["*"] = 500
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "config.json", force_download=True)
    _one_line(info)
    with pytest.raises(MissingFileError) as info:
        find_file("owner/name", "config.json", force_download=True, local_files_only=True)
    assert "cannot be downloaded again: `local_files_only=True` was given" in _one_line(info)


# -- sharded weights


@pytest.mark.parametrize("container", ["safetensors", "msgpack"])
def test_all_shards_are_fetched(
    hub: HubServer, tmp_path: Path, container: Any, waits: list[float]
) -> None:
    stem = {"safetensors": "model", "msgpack": "flax_model"}[container]
    written = save_checkpoint(
        tmp_path / "new", ARRAYS, container=container, stem=stem, max_shard_size=10_000
    )
    files = {"sub/" + path.name: path.read_bytes() for path in written}
    repository = hub.add("owner/name", files)
    index = find_weights("owner/name", subfolder="sub")
    assert index.name == f"{stem}.{container}.index.json"
    with open_checkpoint(index) as checkpoint:
        assert len(checkpoint.files) == 2
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(checkpoint[name].read(), array)
    # The shards are those of the commit the index is from, not of the branch.
    commit = repository.refs["main"]
    assert {path.split("/")[4] for path, _ in hub.asked("GET", "-of-")} == {commit}
    hub.status["*"] = 500
    assert find_weights("owner/name", subfolder="sub") == index
    (index.parent / f"{stem}-00002-of-00002.{container}").unlink()
    with pytest.raises(MissingFileError, match=r"-00002-of-00002.* is not in the cache, and"):
        find_weights("owner/name", subfolder="sub")
    assert waits == []


def test_a_shard_that_is_not_in_the_repository(hub: HubServer, tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path / "new", ARRAYS, max_shard_size=10_000)
    hub.add("owner/name", {path.name: path.read_bytes() for path in written[1:]})
    with pytest.raises(MissingFileError, match=r"has no file model-00001-of-00002\.safetensors"):
        find_weights("owner/name")


def test_a_shard_outside_the_folder_is_never_asked_for(hub: HubServer) -> None:
    index = json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    hub.add("owner/name", {"model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="outside its own folder"):
        find_weights("owner/name")
    assert hub.asked("GET", "passwd") == hub.asked("HEAD", "passwd") == []


# -- uploads


def _model(directory: Path) -> dict[str, bytes]:
    save_checkpoint(directory, ARRAYS, metadata={"format": "pt"}, max_shard_size=10_000)
    (directory / "config.json").write_bytes(CONFIG)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Version 2.4 of huggingface_hub uploads in a way that its own HTTP library deprecates.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@uploads
def test_what_is_uploaded_comes_down_bit_equal(hub: HubServer, tmp_path: Path) -> None:
    files = _model(tmp_path / "model")
    for stray in ("secret.txt", ".env", ".hidden.json", "data.csv"):
        (tmp_path / "model" / stray).write_text("not for the world")
    (tmp_path / "model" / "runs").mkdir()
    (tmp_path / "model" / "runs" / "x.json").write_text("{}")
    url = push_folder(tmp_path / "model", "someone/vit", token="hf_write", private=True)
    repository = hub.repositories["someone/vit"]
    commit = repository.refs["main"]
    assert url == f"{hub.url}/someone/vit/commit/{commit}"
    assert repository.commits[commit].pop(".gitattributes")  # from when it was made
    assert repository.commits[commit] == files
    assert repository.private
    assert repository.messages == ["", "Upload model"]
    with open_checkpoint(find_weights("someone/vit")) as checkpoint:
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(checkpoint[name].read(), array)
    assert find_file("someone/vit", "config.json").read_bytes() == CONFIG


@uploads
def test_upload_to_a_branch_and_as_a_pull_request(hub: HubServer, tmp_path: Path) -> None:
    _model(tmp_path)
    repository = hub.add("someone/vit", {"old": b""})
    for message in ("one", "two"):
        (tmp_path / "config.json").write_text(json.dumps({"message": message}))
        push_folder(
            tmp_path,
            *("someone/vit",),
            files=["config.json"],
            token="hf_write",
            revision="dev",
            commit_message=message,
        )
    assert repository.messages[1:] == ["one", "two"]
    assert sorted(repository.commits[repository.refs["dev"]]) == ["config.json", "old"]
    assert sorted(repository.commits[repository.refs["main"]]) == ["old"]
    url = push_folder(tmp_path, "someone/vit", token="hf_write", create_pr=True)
    assert url == f"{hub.url}/someone/vit/discussions/1"
    assert sorted(repository.commits[repository.refs["main"]]) == ["old"]


@uploads
def test_push_if_asked(hub: HubServer, tmp_path: Path) -> None:
    _model(tmp_path / "my-vit")
    kwargs = {"repo_id": "a/b", "token": "hf_write", "private": True, "other": 1, "revision": None}
    before = dict(kwargs)
    assert push_if_asked(tmp_path / "my-vit", kwargs) is None
    assert kwargs == {"other": 1}
    assert hub.seen == []
    assert before["repo_id"] == "a/b"
    kwargs = {"push_to_hub": True, "use_auth_token": "hf_write", "commit_message": "mine"}
    url = push_if_asked(tmp_path / "my-vit", kwargs, files=["config.json"])
    assert kwargs == {}
    repository = hub.repositories["someone/my-vit"]
    assert url == f"{hub.url}/someone/my-vit/commit/{repository.refs['main']}"
    assert repository.messages == ["", "mine"]
    assert sorted(repository.commits[repository.refs["main"]]) == [".gitattributes", "config.json"]


CARD = ModelCard({"library_name": "lib"}, "\n# {repo}\n", tags=("ours",), added=("a: b", "cats"))


def _without_card(directory: Path) -> None:
    _model(directory)
    (directory / "README.md").unlink()


def _card_of(repository: Repository, branch: str = "main") -> str | None:
    found = repository.commits[repository.refs[branch]].get("README.md")
    return None if found is None else found.decode()


@uploads
def test_a_repository_without_a_model_card_gets_one(hub: HubServer, tmp_path: Path) -> None:
    """Read back by huggingface_hub's own class."""
    _without_card(tmp_path)
    push_folder(tmp_path, "someone/vit", token="hf_write", card=CARD)
    text = _card_of(hub.repositories["someone/vit"])
    assert text is not None
    card = huggingface_hub.ModelCard(text)
    assert card.data.to_dict() == {"library_name": "lib", "tags": ["ours", "a: b", "cats"]}
    assert card.text.strip() == "# someone/vit"
    assert not (tmp_path / "README.md").exists()
    push_folder(tmp_path, "someone/vit", token="hf_write", revision="dev", card=CARD)
    assert _card_of(hub.repositories["someone/vit"], "dev") == text
    plain = CARD._replace(tags=(), added=())
    push_folder(tmp_path, "someone/new", token="hf_write", create_pr=True, card=plain)
    text = _card_of(hub.repositories["someone/new"], "refs/pr/1")
    assert huggingface_hub.ModelCard(str(text)).data.to_dict() == {"library_name": "lib"}
    (tmp_path / "README.md").write_text("mine")
    push_folder(tmp_path, "someone/other", token="hf_write", card=CARD)
    assert _card_of(hub.repositories["someone/other"]) == "mine"


@uploads
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# Mine\n", ["a: b", "cats"]),
        ("---\nlicense: mit\n---\n# Mine\n", ["a: b", "cats"]),
        ("---\nlicense: mit\ntags:\n- cats\n- x\n---\n# Mine\n", ["cats", "x", "a: b"]),
        ("---\ntags: cats\nlicense: mit\n---\n\n# Mine\n", ["cats", "a: b"]),
        ("---\r\ntags: [x]\r\n---\r\n# Mine\r\n", ["x", "a: b", "cats"]),
    ],
)
def test_tags_are_added_to_a_card_that_is_there(
    hub: HubServer, tmp_path: Path, before: str, after: list[str]
) -> None:
    _without_card(tmp_path)
    repository = hub.add("someone/vit", {"README.md": before.encode()})
    push_folder(tmp_path, "someone/vit", token="hf_write", card=CARD._replace(added=()))
    assert _card_of(repository) == before
    push_folder(tmp_path, "someone/vit", token="hf_write", card=CARD)
    text = str(_card_of(repository))
    old, new = huggingface_hub.ModelCard(before), huggingface_hub.ModelCard(text)
    assert new.text.strip() == old.text.strip() == "# Mine"
    assert new.data.to_dict() == {**old.data.to_dict(), "tags": after}
    push_folder(tmp_path, "someone/vit", token="hf_write", card=CARD)
    assert _card_of(repository) == text


@uploads
@pytest.mark.parametrize("broken", ["---\ntags: [x\n---\n", "---\n- x\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_read_stays(hub: HubServer, tmp_path: Path, broken) -> None:
    _without_card(tmp_path)
    content = broken if isinstance(broken, bytes) else broken.encode()
    repository = hub.add("someone/vit", {"README.md": content})
    with pytest.warns(UserWarning, match=r"someone/vit: the front matter of its README\.md cannot"):
        push_folder(tmp_path, "someone/vit", token="hf_write", card=CARD)
    files = repository.commits[repository.refs["main"]]
    assert files["README.md"] == content
    assert files["config.json"]


def test_uploads_that_are_refused(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    files = _model(tmp_path / "model")

    def refused(message: str, *args: str, **options: object) -> None:
        with pytest.raises(MissingFileError, match=message) as info:
            push_folder(tmp_path / "model", *(args or ("someone/vit",)), **options)
        assert "\n" not in str(info.value)

    refused("someone/vit: the Hub refuses the upload; log in with `hf auth login`")
    refused("the Hub refuses the upload", token="hf_read")
    refused("the Hub refuses the upload; log in", token=True)
    refused("'a b' is not a Hub name", "a b", token="hf_write")
    hub.add("someone/there", {"old": b""})
    refused("already has this repository", "someone/there", token="hf_write", exist_ok=False)
    with pytest.raises(MissingFileError, match="nowhere: no such directory; nothing was uploaded"):
        push_folder(tmp_path / "nowhere", "someone/vit")
    with pytest.raises(MissingFileError, match=r"nothing was uploaded, for it lacks x\.json"):
        push_folder(tmp_path / "model", "someone/vit", files=["x.json"])
    with pytest.raises(MissingFileError, match="lacks model files"):
        push_folder(tmp_path, "someone/vit")
    hub.status["*"] = 500
    refused("someone/vit: not uploaded; the Hub answers 500", token="hf_write")
    _point_at(monkeypatch, "http://127.0.0.1:9")
    refused(r"not uploaded to http://127\.0\.0\.1:9 \(Connection refused\)", token="hf_write")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files


@pytest.mark.parametrize("name", ["x" * 5000, "owner/" + "x" * 100, "a--b", "owner/-x", "a..b"])
def test_a_name_that_no_file_and_no_repository_can_have(name):
    """By huggingface_hub's own rules."""
    with pytest.raises(huggingface_hub.errors.HFValidationError):
        huggingface_hub.utils.validate_repo_id(name)
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(MissingFileError, match="nor a Hub name"):
            read_config_file(name, **options)


def test_a_shard_whose_name_no_file_can_have(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError, match="shard x"):
        open_checkpoint(index)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_a_folder_that_none_can_be_called(name, tmp_path):
    with pytest.raises(MissingFileError, match="cannot be made"):
        make_directory(tmp_path / name)
    with pytest.raises(MissingFileError, match="cannot be made"):
        convert(embedded_checkpoint(), tmp_path / name)
