"""`--on ray`: the images of `vit predict` and `vit features` go through a Ray cluster.

Ray places the actors, restarts those that die, does their batches again, and writes the parts of
the output; `vit_flax.inference.ray_data` has what runs in the actors. What is here finds the
images, starts or joins the cluster, and says what came out.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_cli.terminal.exit_codes import DONE, SOME_FAILED
from vit_cli.terminal.messages import counted, is_quiet, one_line, say
from vit_common.datasets.table import IMAGE_COLUMNS
from vit_common.errors import ExistingFileError, HostError, InputError, MissingFileError, ViTError
from vit_common.files.texts import reason
from vit_common.images import kinds
from vit_common.images.find import find_images

if TYPE_CHECKING:
    from vit_cli.options import StreamOptions

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_BLOCKS = 4096  # at most, of names: each is an object that Ray keeps track of
_PATIENCE = 10.0  # seconds
_PIECES = 4  # batches of the network in one of Ray


def run_on_ray(
    options: argparse.Namespace,
    stream: StreamOptions,
    callable_name: str,
    arguments: dict[str, Any],
) -> int:
    """Put images through a Ray cluster and write a folder of Parquet files.

    Args:
        options: what was given, among it the options of `add_ray`.
        stream: the same, as `vit predict` and `vit features` share it.
        callable_name: class of `vit_flax.inference.ray_data`.
        arguments: of that class, besides what `stream` says.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        InputError: Ray is not installed, or an option does not fit the cluster.
        ViTError: the model cannot be loaded, images not be found, or the output not be written.
        HostError: the cluster cannot be reached, or a task of it failed for good.
    """
    ray = _ray()
    faults = 0

    def report(text: str) -> None:
        nonlocal faults
        faults += 1
        say("error", text)

    output = _Output(str(options.output), force=stream.force)
    files, tables = _find(stream.names, options.image_column, report)
    if not files and not tables:
        return SOME_FAILED
    _check_model(stream, needs_classifier=callable_name == "ImagePredictions")
    with _cluster(ray, options.ray_address):
        actors = _actors(ray, options)
        size = stream.batch_size or (64 if actors.keys() & {"num_gpus", "resources"} else 8)
        given = {
            "model": _reachable(stream.model),
            "image": "source",
            "keep": ["file"],
            "batch_size": size,
            "max_pixels": options.max_pixels,
            "dtype": stream.dtype,
            **stream.precision,
            **stream.reading.keywords,
            **arguments,
        }
        from vit_flax.inference import ray_data

        images = _dataset(ray, files, tables, size * _PIECES)
        results = images.map_batches(
            getattr(ray_data, callable_name),
            fn_constructor_kwargs=given,
            batch_size=size * _PIECES,
            batch_format="numpy",
            # Ray restarts an actor that dies, and has what it was doing done again.
            **actors,
        )
        with output.written() as place:
            results.write_parquet(place)
            rows, failed = output.count(place)
            if not tables and rows != len(files):
                raise HostError(
                    f"Ray wrote {rows} rows for {counted(len(files))}; nothing was kept."
                )
    also = f"; {counted(failed)} could not be read (column `error`)" if failed else ""
    say(f"wrote {output.name}: {counted(rows)}{also}")
    return SOME_FAILED if failed or faults else DONE


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unasked
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            "--on ray needs Ray; run: pip install 'ray[data]' (the extra `ray`)"
        ) from error
    return ray


# -- the cluster


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Ray, joined or started on this machine alone; its errors become ours."""
    joined: dict[str, Any] = {"address": address}
    if address is not None:
        _check_answers(address)
    else:
        joined = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray to itself; those of the model are in the actors
        yield from _connected(ray, address, joined)


def _check_answers(address: str) -> None:
    """Raise HostError if nobody listens at HOST:PORT, which Ray itself finds out after minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return  # "auto", "local", or what Ray says something about
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise HostError(
            f"the cluster at {address} cannot be reached ({reason(error)}); is the address right, "
            "and does a head node of Ray run there?"
        ) from error


def _connected(ray: Any, address: str | None, joined: dict[str, Any]) -> Iterator[None]:
    try:
        with _nothing_printed():
            ray.init(**joined, log_to_driver=False, logging_level="error", configure_logging=True)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = "a cluster on this machine" if address is None else f"the cluster at {address}"
        verb = "started" if address is None else "reached"
        raise HostError(f"{where} cannot be {verb} ({one_line(reason(error))}).") from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty() and not is_quiet()
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _told(error) from error
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """Ray's core writes lines of its own to standard error, past Python; what matters is raised."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _told(error: BaseException) -> ViTError:
    """A failure inside the cluster, as the error it was there, or in one line."""
    seen: BaseException | None = error
    while seen is not None:
        for inner in (seen, getattr(seen, "cause", None)):
            if isinstance(inner, ViTError):
                return type(inner)(str(inner))
        seen = seen.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return HostError(f"Ray: {lines[-1] if lines else type(error).__name__}")


def _actors(ray: Any, options: argparse.Namespace) -> dict[str, Any]:
    """How many actors there are and what each one gets: a GPU, all TPU chips of a machine, or its
    processor."""
    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive")]
    total = ray.cluster_resources()
    cores = min((int(node.get("CPU", 0)) for node in nodes if node.get("CPU")), default=1)
    found: dict[str, Any] = {}
    resources = dict(options.actor_resource)
    chips = max((node.get("TPU", 0) for node in nodes), default=0)
    if options.actor_gpus is not None or (total.get("GPU") and not resources):
        gpus = 1.0 if options.actor_gpus is None else options.actor_gpus
        found["num_gpus"], count = gpus, int(total.get("GPU", 0) / gpus)
    elif resources or chips:
        resources = resources or {"TPU": chips}
        found["resources"] = resources
        count = min(int(total.get(name, 0) / n) for name, n in resources.items())
    else:
        found["num_cpus"] = max(1, cores - 1)  # one is left for reading and writing
        # Ray sets it to the cores that are left, and XLA uses no more threads than that.
        threads = int(max(1, options.actor_cpus or cores))
        found["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        count = len(nodes)
    if options.actor_cpus is not None:
        found["num_cpus"] = options.actor_cpus
    if count < 1:
        wanted = {n: v for n, v in found.items() if n in ("num_gpus", "resources")}
        raise InputError(f"no machine of the cluster has what an actor wants ({wanted}).")
    found["compute"] = ray.data.ActorPoolStrategy(size=options.actors or count)
    return found


# -- images


def _find(
    names: list[str], column: str | None, report: Any
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names of images with where they are read, and Parquet tables that hold images themselves,
    with the column."""
    files: dict[str, str] = {}
    tables = []
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in _TABLES:
            table = _table(name, column)
            if table is None:
                tables.append((name, _image_column(name, _schema(name), column)))
            else:
                files.update(table)
        elif "://" in name:
            files.update((uri, uri) for uri in _listed(name, report))
        else:
            found = find_images([name], report, say)
            files.update((file, os.path.abspath(file)) for file in found)
    return [*files.items()], tables


def _system(name: str) -> tuple[Any, str]:
    """The file system of a name or URI, and the path in it."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem, LocalFileSystem

    if "://" not in name:
        return LocalFileSystem(), os.path.abspath(name)
    try:
        return FileSystem.from_uri(name)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(f"{name}: not a URI that pyarrow can open ({reason(error)}).") from error


def _listed(uri: str, report: Any) -> Iterator[str]:
    """The images behind a URI of a folder, or the URI of an image itself."""
    from pyarrow.fs import FileSelector, FileType

    system, path = _system(uri)
    try:
        about = system.get_file_info(path)
        if about.type != FileType.Directory:
            yield uri
            return
        below = system.get_file_info(FileSelector(path, recursive=True))
    except OSError as error:
        report(f"{uri}: cannot be listed ({reason(error)}).")
        return
    start = uri.rstrip("/")
    found = [
        f"{start}/{each.path[len(path.rstrip('/')) + 1 :]}"
        for each in below
        if each.type == FileType.File
        and os.path.splitext(each.path)[1].lower() in kinds.EXTENSIONS
        and not kinds.is_dropping(each.base_name)
    ]
    if not found:
        report(f"{uri}: no images in this folder.")
    yield from sorted(found)


def _schema(name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    system, path = _system(name)
    try:
        with system.open_input_file(path) as source:
            return pq.read_schema(source)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ViTError:
    kind = MissingFileError if isinstance(error, FileNotFoundError) else InputError
    return kind(f"{name}: cannot be read as a table ({one_line(reason(error))}).")


def _image_column(name: str, schema: Any, column: str | None) -> str:
    known = IMAGE_COLUMNS if column is None else (column,)
    for each in known:
        if each in schema.names:
            return each
    raise InputError(
        f"{name}: no column {' or '.join(known)}; there are {', '.join(schema.names)}. Name the "
        "column of the images with --image-column."
    )


def _table(name: str, column: str | None) -> dict[str, str] | None:
    """The images that a table names, from its own folder; None if it holds them itself."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet as pq

    suffix = os.path.splitext(name)[1].lower()
    system, path = _system(name)
    try:
        if suffix == ".parquet":
            schema = _schema(name)
            where = _image_column(name, schema, column)
            kind = schema.field(where).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                return None
            table = pq.read_table(path, columns=[where], filesystem=system)
        else:
            with system.open_input_stream(path) as source:
                if suffix in (".csv", ".tsv"):
                    dialect = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",")
                    table = pyarrow.csv.read_csv(source, parse_options=dialect)
                else:
                    table = pyarrow.json.read_json(source)
            where = _image_column(name, table.schema, column)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(name, error) from error
    folder = name.rpartition("/")[0] if "://" in name else os.path.dirname(os.path.abspath(name))
    return {
        str(file): file if "://" in str(file) else os.path.join(folder, str(file))
        for file in table[where].to_pylist()
    }


def _dataset(
    ray: Any, files: list[tuple[str, str]], tables: list[tuple[str, str]], rows: int
) -> Any:
    """A dataset with the columns `file` and `source`."""
    import pyarrow as pa

    parts = []
    if files:
        each = max(rows, -(-len(files) // _BLOCKS))
        blocks = [files[at : at + each] for at in range(0, len(files), each)]
        kind = pa.string()
        parts.append(
            ray.data.from_arrow(
                [
                    pa.table({"file": pa.array(a, kind), "source": pa.array(b, kind)})
                    for a, b in (zip(*block, strict=True) for block in blocks)
                ]
            )
        )
    for name, column in tables:
        place = name if "://" in name else os.path.abspath(name)
        whole = ray.data.read_parquet(place, columns=[column])
        parts.append(
            whole.map_batches(
                _named, fn_kwargs={"column": column}, batch_format="pyarrow", batch_size=rows
            )
        )
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _named(batch: Any, column: str) -> Any:
    """Rows of a table that holds images, as Hugging Face writes them or as bytes alone."""
    import pyarrow as pa

    values = batch[column].to_pylist()
    paths = [value.get("path") if isinstance(value, dict) else None for value in values]
    held = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    return pa.table({"file": pa.array(paths, pa.string()), "source": pa.array(held, pa.binary())})


# -- the model and the output


def _reachable(model: str | None) -> str | None:
    """The model's name as actors have it, which work in other folders."""
    return os.path.abspath(model) if model is not None and os.path.exists(model) else model


def _check_model(stream: StreamOptions, *, needs_classifier: bool) -> None:
    """Raise what loading the model would raise, before a cluster is asked to: no weight is read."""
    if stream.model is None:
        return
    from vit_convert.source import open_source

    with open_source(stream.model, **stream.reading.for_source) as source:
        if needs_classifier and not source.classifies:
            raise InputError(
                f"{stream.model}: these weights have no classifier, so predictions would be "
                "random; use `vit features`, or a checkpoint that was trained to classify."
            )


class _Output:
    """The folder of Parquet files. On a disk it appears when all of it is there."""

    def __init__(self, name: str, *, force: bool) -> None:
        from pyarrow.fs import FileSelector, FileType

        self.name = name
        self.remote = "://" in name
        self.system, self.path = _system(name)
        self._stale = False
        about = self.system.get_file_info(self.path)
        if about.type == FileType.File:
            raise MissingFileError(f"{name}: with --on ray the output is a folder; this is a file.")
        if about.type == FileType.Directory:
            inside = self.system.get_file_info(FileSelector(self.path))
            for each in inside:
                if each.type != FileType.File or not each.base_name.endswith(".parquet"):
                    raise ExistingFileError(
                        f"{name}: holds {each.base_name}, which no earlier output has; nothing was "
                        "written. Name another folder with --output."
                    )
            if inside and not force:
                raise ExistingFileError(
                    f"{name}: already there; nothing was written. Pass --force to overwrite."
                )
            self._stale = bool(inside)
        if not self.remote and not Path(self.path).parent.is_dir():
            raise MissingFileError(f"{Path(self.path).parent}: no such directory; make it first.")

    @contextlib.contextmanager
    def written(self) -> Iterator[str]:
        """Where Ray is to write; what is there becomes the output, unless this fails."""
        if self.remote:
            if self._stale:
                self.system.delete_dir_contents(self.path)
            yield self.name
            return
        partial = f"{self.path}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
            if os.path.isdir(self.path):
                shutil.rmtree(self.path)
            os.replace(partial, self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def count(self, place: str) -> tuple[int, int]:
        """Number of rows, and how many of them are errors."""
        import pyarrow.dataset as ds

        path = self.path if self.remote else place
        found = ds.dataset(path, filesystem=self.system, format="parquet")
        return found.count_rows(), found.count_rows(filter=ds.field("error").is_valid())
