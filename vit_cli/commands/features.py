"""`vit features`: image files in, a file of feature vectors out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from vit_cli.models import load_for_inference, settings
from vit_cli.runs.feature_file import FeatureFile
from vit_cli.runs.job import Job, Work
from vit_cli.runs.supervise import Cluster


def features(
    names: list[str],
    model: str | None,
    output: str,
    *,
    layers: tuple[int, ...] = (-1,),
    pool: Literal["cls", "mean"] | None = "cls",
    store_dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
    dtype: str = "float32",
    resume: bool = False,
    force: bool = False,
    shard: tuple[int, int] | None = None,
    devices: int | None = None,
    model_parallel: int = 1,
    cluster: Cluster | None = None,
    hub: Mapping[str, Any] | None = None,
) -> int:
    """Write the features of image files into one file.

    Args:
        names: image files, and folders of them.
        model: folder, weights file or Hub name, with a classifier or without; None is the
            checkpoint in the package.
        output: see `vit_cli.runs.feature_file`.
        layers, pool: as `ImageEncoder.features`.
        store_dtype: of the numbers in the file.
        batch_size, dtype, devices, model_parallel, hub: as `vit_cli.commands.predict.predict`.
        resume, force, shard, cluster: as `vit_cli.runs.job.Job`.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded, or the file not be written.
        HostError: another process did not come, or stopped.
    """

    def begin(files: list[str]) -> Work:
        encoder = load_for_inference(
            "ImageEncoder", model, dtype, hub, devices=devices, model_parallel=model_parallel
        )
        size = batch_size or encoder.default_batch_size
        return Work(encoder.stream_features(files, layers, pool, size), size)

    run = {
        **settings(model, dtype, hub, shard),
        "layers": list(layers),
        "pool": pool,
        "store_dtype": store_dtype,
    }
    return Job(
        names,
        run,
        begin,
        partial(FeatureFile, dtype=store_dtype),
        what="features",
        output=output,
        resume=resume,
        force=force,
        shard=shard,
        cluster=cluster,
    ).run()
