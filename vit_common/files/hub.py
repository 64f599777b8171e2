"""A directory, a file, or the name of a Hub repository -> files on this machine; and uploads.

`huggingface_hub` does the talking, and with it come its cache, its login and its environment
variables (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`). It takes a while to import, so
it is imported where it is called.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from vit_common.errors import InputError, MissingFileError, some, warn
from vit_common.files.cards import CARD_NAME, ModelCard
from vit_common.files.checkpoint import INDEX_SUFFIX, shard_names
from vit_common.files.containers import orbax_folder
from vit_common.files.texts import reason
from vit_common.versions import PACKAGE

HUB_OPTIONS = (
    "revision",
    "subfolder",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)
"""Keywords of `from_pretrained` that say which files are meant and how they are fetched."""

PUSH_OPTIONS = (
    "repo_id",
    "token",
    "private",
    "commit_message",
    "revision",
    "create_pr",
    "use_auth_token",
)
"""Options of an upload."""

# Keywords that Transformers 4.57.6 takes too, without effect here: downloads always
# resume, and no code of a repository is ever run.
_WITHOUT_EFFECT = (
    "resume_download",
    "trust_remote_code",
    "mirror",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
)

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.npz",
    "model.weights.h5",
    "model.pth",
)
"""Names of weights files, in the order they are looked for."""

_SUFFIXES = (".safetensors", ".msgpack", ".bin", ".npz", ".pt", ".pth", ".h5", ".json")
_PUSHED = (".safetensors", ".msgpack", ".json", ".md")
_SHOWN = 12
_LIBRARY = PACKAGE
"""How requests name this project to the Hub."""


class AbsentFileError(MissingFileError):
    """The repository was reached, or the directory read: the file is not in it."""


class _Unreachable(MissingFileError):
    """The Hub could not be asked, and the cache does not have the file."""


class _Interrupted(MissingFileError):
    """The Hub has the file, but the connection did not hold."""


class _Repository(NamedTuple):
    name: str
    revision: str | None
    commit: str | None = None  # what the revision stands for, once that is known


def split_hub_options(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the keywords of a `from_pretrained` call: (`HUB_OPTIONS`, the rest).

    Older spellings that Transformers 4.57.6 accepts are taken too: `use_auth_token` becomes
    `token`; those without effect here are dropped.

    Raises:
        InputError: `token` and `use_auth_token` contradict each other.
    """
    rest = {key: value for key, value in kwargs.items() if key not in _WITHOUT_EFFECT}
    old_token = rest.pop("use_auth_token", None)
    hub = {key: rest.pop(key) for key in HUB_OPTIONS if key in rest}
    hub = {key: value for key, value in hub.items() if value is not None}
    if old_token is not None and hub.setdefault("token", old_token) != old_token:
        raise InputError(
            "`token` and `use_auth_token` were both given, and differ; pass only `token`."
        )
    return hub, rest


class ModelFiles:
    """The files of one model: those of a folder, or of one commit of a Hub repository.

    A name is resolved once, when the first file is asked for: whether the Hub can be reached, and
    which commit a branch stands for. Files are fetched one by one, so that a configuration can be
    read, and refused, before gigabytes of weights are downloaded.

    Args:
        name_or_path: a folder; a file; or a Hub repository: "owner/name", "name" or
            "owner/name@revision".
        **hub: `HUB_OPTIONS`, as `huggingface_hub.hf_hub_download` takes them. Without a network
            a complete copy in the cache is used.

    Attributes:
        name: `name_or_path` as it was given.

    Raises:
        MissingFileError: a path does not exist, or the name is not one that the Hub can have.
        InputError: an option is unknown, or two contradict each other.

    Example:
        >>> files = ModelFiles("google/vit-base-patch16-224", revision="main")
        >>> files.find("config.json"), files.weights()
    """

    def __init__(self, name_or_path: str | os.PathLike, **hub: Any) -> None:
        self.name = name_or_path
        self.hub = {key: value for key, value in hub.items() if value is not None}
        self._place = _locate(name_or_path, self.hub)
        self._asked = False
        self._alone: str | None = None

    @property
    def local(self) -> Path | None:
        """The folder or file on this machine; None for a repository on the Hub."""
        return None if isinstance(self._place, _Repository) else self._place

    def has_weights(self) -> bool:
        """Whether a local folder holds weights of a whole model."""
        place = self.local
        if place is None or not place.is_dir():
            return False
        if any((place / name).is_file() for name in WEIGHTS):
            return True
        return orbax_folder.find(place) is not None

    def find(self, filename: str) -> Path | None:
        """The path of one file, downloaded if it has to be; None if the model has no such file.

        Args:
            filename: such as "config.json".

        Raises:
            MissingFileError: the file cannot be fetched; says why.
        """
        try:
            return self.need(filename)
        except AbsentFileError:
            return None

    def need(self, filename: str) -> Path:
        """As `find`, for a file that has to be there.

        Raises:
            AbsentFileError: the model has no such file; says where it was looked for.
            MissingFileError: the file cannot be fetched; says why.
        """
        place = self._place
        if isinstance(place, _Repository):
            return self._fetch(filename)
        if place.is_file():
            # An index of weights is JSON too, but no configuration.
            if place.suffix == Path(filename).suffix and not place.name.endswith(INDEX_SUFFIX):
                return place
            place = place.parent
        path = place / filename
        if not path.is_file():
            raise AbsentFileError(f"{path}: no such file; {_contents(place)}")
        return path

    def weights(self, prefer: tuple[str, ...] | None = None, *, fetch: bool = True) -> Path:
        """The path of the weights file, or of its index once all its shards are here.

        Args:
            prefer: names to look for before those of `WEIGHTS`.
            fetch: False takes only what is on this machine already.

        Warns:
            UserWarning: a folder holds several weights files, and another one is newer than the
                one that is used.

        Raises:
            MissingFileError: there are none; says what was looked for and what there is.
            CheckpointError: an index names a shard outside its own folder.
        """
        names = tuple(dict.fromkeys((*(prefer or ()), *WEIGHTS)))
        place = self._place
        if isinstance(place, _Repository):
            return self._fetch_weights(names, fetch)
        if place.is_file():
            return place
        found = [place / name for name in names if (place / name).is_file()]
        if not found and orbax_folder.find(place) is not None:
            return place
        if not found:
            raise MissingFileError(
                f"{place}: no weights there; looked for {', '.join(names)}; {_contents(place)}"
            )
        _warn_if_older(found)
        return found[0]

    # -- of a repository

    def _fetch(self, filename: str, alone: str | None = None) -> Path:
        """A file from the Hub; only from the cache if `alone` gives a reason for that."""
        assert isinstance(self._place, _Repository)
        if alone is None:
            if not self._asked:
                self._alone = _why_not_asked(self._place, filename, self.hub)
                self._asked = True
            alone = self._alone
        path = _download(self._place, filename, self.hub, alone)
        parts = path.parts
        if self._place.commit is None and "snapshots" in parts:
            # All further files from this commit, whatever is pushed meanwhile.
            commit = parts[parts.index("snapshots") + 1]
            self._place = self._place._replace(commit=commit)
        return path

    def _fetch_weights(self, names: tuple[str, ...], fetch: bool) -> Path:
        assert isinstance(self._place, _Repository)
        alone = None if fetch else "only files that are here already were asked for"
        unreachable: _Unreachable | None = None
        listed: list[str] | None = None
        for name in names:
            if listed is not None and name not in listed:
                continue
            try:
                path = self._fetch(name, alone)
            except AbsentFileError:
                if listed is None and alone is None and self._alone is None:
                    # Most repositories have the first name; of others, one question says what
                    # there is.
                    listed = _list_files(self._place, self.hub)
                continue
            except _Unreachable as error:  # the cache may hold another one
                unreachable = unreachable or error
                continue
            if name.endswith(INDEX_SUFFIX):
                for shard in shard_names(path):
                    self._fetch(shard, alone)
            return path
        if unreachable is not None:
            raise unreachable
        there = "what there is could not be listed."
        if listed is not None:
            there = f"there is {some(sorted(listed), _SHOWN)}."
        raise MissingFileError(
            f"{self._place.name} on the Hub has no weights (revision "
            f"{self._place.revision or 'main'}); looked for {', '.join(names)}; {there}"
        )


def find_file(name_or_path: str | os.PathLike, filename: str, **hub: Any) -> Path:
    """The path of one file of a model: `ModelFiles(name_or_path, **hub).need(filename)`."""
    return ModelFiles(name_or_path, **hub).need(filename)


def find_weights(
    name_or_path: str | os.PathLike, *, prefer: tuple[str, ...] | None = None, **hub: Any
) -> Path:
    """The path of a model's weights: `ModelFiles(name_or_path, **hub).weights(prefer)`."""
    return ModelFiles(name_or_path, **hub).weights(prefer)


def _warn_if_older(found: list[Path]) -> None:
    used, *others = found
    times = {path: path.stat().st_mtime for path in found}
    newer = [path.name for path in others if times[path] > times[used] + 1]
    if newer:
        warn(
            f"{used.parent} holds several weights files: {used.name} is used, but "
            f"{', '.join(newer)} is newer. Delete what is out of date, or name the file to use."
        )


# -- names


def _locate(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> Path | _Repository:
    """The directory (with `subfolder`) or file of that name, or else the repository."""
    unknown = [key for key in hub if key not in HUB_OPTIONS]
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}; wanted one of {', '.join(HUB_OPTIONS)}.")
    text = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text:
        raise InputError(f"`name_or_path` must be a path or a Hub name; given {name_or_path!r}.")
    path = Path(text)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long for a path, or not to be looked at
        exists = False
    if exists:
        if path.is_file():
            return path
        path = path / hub.get("subfolder", "")
        if not os.path.isdir(path):
            raise MissingFileError(f"{path}: no such directory.")
        return path
    name, _, revision = text.partition("@")
    if (
        re.match(r"[./~]|[A-Za-z]:", text)
        or "\\" in text
        or name.count("/") > 1
        or name.endswith(("/", *_SUFFIXES))
    ):
        raise MissingFileError(f"{text}: no such file or directory.")
    if not _is_hub_name(name) or ("@" in text and not revision):
        raise MissingFileError(
            f"{text!r} is neither a file or directory here nor a Hub name such as 'owner/name' or "
            "'owner/name@revision'."
        )
    given = hub.get("revision")
    if revision and given not in (None, revision):
        raise InputError(
            f"two revisions were given: {revision!r} in {text!r}, and `revision={given!r}`."
        )
    return _Repository(name, revision or given)


def _is_hub_name(name: str) -> bool:
    """Whether a repository can have that name, by the rules of the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _contents(directory: Path) -> str:
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        return f"the directory cannot be read ({reason(error)})."
    return f"there is {some(names, _SHOWN)}."


# -- downloads


def _list_files(place: _Repository, hub: Mapping[str, Any]) -> list[str] | None:
    """Names of the files in a repository's folder; None where the Hub does not say."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # The request of `HfApi.model_info`, which knows no `proxies`.
    revision = quote(place.commit or place.revision or "main", safe="")
    url = f"{constants.ENDPOINT}/api/models/{place.name}/revision/{revision}"
    headers = build_hf_headers(token=hub.get("token"), library_name=_LIBRARY)
    try:
        answer = get_session().get(
            url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT, **_proxies(hub)
        )
        hf_raise_for_status(answer)
        files = [str(file["rfilename"]) for file in answer.json()["siblings"]]
    except Exception:  # only to know sooner what there is; each file can be asked for by itself
        return None
    start = f"{hub['subfolder'].strip('/')}/" if hub.get("subfolder") else ""
    return [file.removeprefix(start) for file in files if file.startswith(start)]


def _why_not_asked(place: _Repository, filename: str, hub: Mapping[str, Any]) -> str | None:
    """Why only the cache can be used; None if the Hub answers.

    Versions of `huggingface_hub` from 0.36 on ask six times in 24 seconds, print every attempt,
    and some only then look into their cache; so the first question is asked here, once.
    """
    from huggingface_hub import constants, errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    if hub.get("local_files_only"):
        return "`local_files_only=True` was given (--local-files-only in a command)"
    try:
        url = hf_hub_url(
            place.name,
            filename,
            subfolder=hub.get("subfolder"),
            revision=place.commit or place.revision,
        )
        headers = build_hf_headers(token=hub.get("token"), library_name=_LIBRARY)
        status = (
            get_session()
            .head(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT, **_proxies(hub))
            .status_code
        )
    except (errors.HFValidationError, errors.LocalTokenNotFoundError):
        return None  # the download says it
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE keeps it from the network"
    except Exception as error:  # requests and httpx have no class in common
        return f"{constants.ENDPOINT} cannot be reached ({_plain_reason(error)})"
    return f"the Hub answers {status}; try again later" if status >= 500 else None


def _proxies(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The option `proxies`, where this version of the library can take it."""
    from huggingface_hub import hf_hub_download

    if "proxies" not in hub or "proxies" in inspect.signature(hf_hub_download).parameters:
        return {key: value for key, value in hub.items() if key == "proxies"}
    warn(
        "`proxies` is not used: this version of huggingface_hub takes them from the environment "
        "(HTTPS_PROXY)."
    )
    return {}


def _download(place: _Repository, filename: str, hub: Mapping[str, Any], alone: str | None) -> Path:
    """The file, from the Hub; only from the cache if `alone` gives a reason for that."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name, revision = place.name, place.revision
    wanted = place.commit or revision
    if alone is not None:
        inside = "/".join(filter(None, (hub.get("subfolder"), filename)))
        known = try_to_load_from_cache(name, inside, hub.get("cache_dir"), wanted)
        if hub.get("force_download"):
            raise _Unreachable(f"{name}: {filename} cannot be downloaded again: {alone}.")
        if isinstance(known, str):
            return Path(known)
        if known is not None:  # the cache also remembers what a repository lacks
            raise AbsentFileError(f"{name} on the Hub had no file {filename} when last asked.")
        raise _Unreachable(
            f"{name}: no such file or folder here; {filename} of that repository on the Hub "
            f"(revision {revision or 'main'}) is not in the cache, and {alone}."
        )
    options = {key: value for key, value in hub.items() if key != "proxies"}
    options |= {"revision": wanted, "library_name": _LIBRARY, **_proxies(hub)}
    try:
        return Path(hf_hub_download(name, filename, **options))
    except Exception as error:  # requests, httpx, xet and the library each raise their own
        failure = _explain(error, place, filename)
        if isinstance(failure, _Interrupted):
            failure = _mention_older_copy(failure, place, filename, hub)
        raise failure from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _plain_reason(error: BaseException) -> str:
    # Sockets give it; what is raised around them repeats addresses and the names of objects.
    plain = [e.strerror for e in _chain(error) if isinstance(e, OSError) and e.strerror]
    return plain[-1] if plain else reason(error)[:200]


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    responses = [getattr(e, "response", None) for e in _chain(error)]
    return next((response.status_code for response in responses if response is not None), None)


def _explain(error: Exception, place: _Repository, filename: str) -> MissingFileError:
    """The one line that says what went wrong and what to do about it."""
    from huggingface_hub import constants, errors

    name, revision = place.name, place.revision or "main"
    why, status = _plain_reason(error), _status(error)
    login = "log in with `hf auth login` or pass `token=`"

    if isinstance(error, errors.GatedRepoError):
        return MissingFileError(
            f"{name}: access on the Hub is restricted; accept its conditions at "
            f"{constants.ENDPOINT}/{name}, then {login}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingFileError(
            f"{name}: neither a file or directory here nor a repository on the Hub; check the "
            f"spelling, or if it is private, {login}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingFileError(f"{name}: the Hub has this repository, but no {revision!r} in it.")
    if isinstance(error, errors.HFValidationError):
        return MissingFileError(f"{name}: neither a file or directory here nor a Hub name ({why}).")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return MissingFileError(
            f"{name}: `token=True` was given, but nobody is logged in; {login}."
        )
    if status in (401, 403):
        return MissingFileError(f"{name}: the Hub refuses access ({status}); {login}.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return AbsentFileError(f"{name} on the Hub has no file {filename} (revision {revision}).")
    if status is not None:
        return MissingFileError(f"{name}: the Hub answers {status} for {filename} ({why}).")
    return _Interrupted(
        f"{name}: {filename} could not be downloaded from {constants.ENDPOINT} ({why}); what "
        "arrived is kept, run it again to go on."
    )


def _mention_older_copy(
    failure: MissingFileError, place: _Repository, filename: str, hub: Mapping[str, Any]
) -> MissingFileError:
    from huggingface_hub import constants

    folder = Path(hub.get("cache_dir") or constants.HF_HUB_CACHE)
    folder = folder / ("models--" + place.name.replace("/", "--")) / "snapshots"
    inside = Path(hub.get("subfolder", "")) / filename
    commits = [path.name for path in sorted(folder.glob("*")) if (path / inside).is_file()]
    if not commits:
        return failure
    return MissingFileError(
        f"{failure} The cache has it from another revision: pass `revision={commits[-1]!r}`."
    )


# -- uploads


def push_folder(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    files: Iterable[str] | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = True,
    card: ModelCard | None = None,
) -> str:
    """Upload the model in a directory as one commit; the repository is made if it is not there.

    Args:
        directory: where the files are. Subdirectories are not looked into.
        repo_id: "owner/name", or "name" in the namespace of the user who is logged in.
        files: names of the files to upload; None takes every weights file, JSON file and model
            card (`.safetensors`, `.msgpack`, `.json`, `.md`), and nothing else that lies there.
        token: None takes the one of `hf auth login`.
        private: whether a new repository is private.
        commit_message: None says "Upload model".
        revision: branch to commit to, made if it is not there.
        create_pr: open a pull request instead of committing to the branch.
        exist_ok: whether the repository may be there already.
        card: model card for a repository that has none, unless one is among the files; tags are
            added to an existing one.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        MissingFileError: there is nothing to upload, or the Hub refuses it or is not reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory = Path(directory)
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such directory; nothing was uploaded.")
    if files is None:
        paths = [path for path in sorted(directory.iterdir()) if path.suffix in _PUSHED]
        paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    else:
        paths = [directory / name for name in files]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise MissingFileError(
            f"{directory}: nothing was uploaded, for it lacks "
            f"{some(missing or ['model files'], _SHOWN)}; "
            f"{_contents(directory)}"
        )
    api = HfApi(token=token, library_name=_LIBRARY)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=exist_ok).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(path.name, str(path)) for path in paths]
        if card is not None and CARD_NAME not in [path.name for path in paths]:
            text = card.to_upload(api, repo, revision)
            added += [] if text is None else [CommitOperationAdd(CARD_NAME, text)]
        commit = api.create_commit(
            repo,
            added,
            commit_message=commit_message or "Upload model",
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:  # as in _download
        raise _explain_upload(error, repo_id) from error
    return str(commit.pr_url or commit.commit_url)


def _explain_upload(error: Exception, repo_id: str) -> MissingFileError:
    from huggingface_hub import constants, errors

    why, status = _plain_reason(error), _status(error)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        hint = "log in with `hf auth login` or pass a `token=` that may write there"
        return MissingFileError(f"{repo_id}: the Hub refuses the upload; {hint}.")
    if status == 409:
        return MissingFileError(f"{repo_id}: the Hub already has this repository; not uploaded.")
    if isinstance(error, errors.HFValidationError):
        return MissingFileError(f"{repo_id!r} is not a Hub name such as 'owner/name' ({why}).")
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in _chain(error)):
        return MissingFileError(f"{repo_id}: not uploaded; HF_HUB_OFFLINE forbids the network.")
    if status is not None:
        return MissingFileError(f"{repo_id}: not uploaded; the Hub answers {status} ({why}).")
    return MissingFileError(f"{repo_id}: not uploaded to {constants.ENDPOINT} ({why}).")


def push_file(
    write: Callable[[Path], object], name: str, repo_id: str, **kwargs: Any
) -> str | None:
    """Upload one file, which `write` makes at the path that it is given.

    Returns, Raises: as `push_if_asked`.
    """
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory) / name)
        options = {**kwargs, "push_to_hub": True, "repo_id": repo_id}
        return push_if_asked(Path(directory), options, files=[name])


def push_if_asked(
    directory: Path,
    kwargs: MutableMapping[str, Any],
    files: Iterable[str] | None = None,
    card: ModelCard | None = None,
) -> str | None:
    """Upload what a `save_pretrained` wrote, where its `push_to_hub=True` asks for that.

    Takes `push_to_hub`, `repo_id` (default: the directory's name) and the options of
    `push_folder` out of `kwargs`, whether it uploads or not.

    Returns:
        The address of the commit, or None.

    Raises:
        MissingFileError: as `push_folder`.
    """
    wanted = kwargs.pop("push_to_hub", False)
    old_token = kwargs.pop("use_auth_token", None)
    options = {
        key: kwargs.pop(key)
        for key in PUSH_OPTIONS
        if key in kwargs and key not in ("repo_id", "use_auth_token")
    }
    if options.get("token") is None and old_token is not None:
        options["token"] = old_token
    repo_id = kwargs.pop("repo_id", None) or Path(directory).resolve().name
    if not wanted:
        return None
    if card is not None:
        options["card"] = card
    return push_folder(directory, repo_id, files=files, **options)
