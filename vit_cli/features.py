"""`vit features`: image files in, a file of feature vectors out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Literal

from vit_cli import interrupt
from vit_cli.exit_codes import DONE, INTERRUPTED, SOME_FAILED
from vit_cli.feature_file import FeatureFile
from vit_cli.messages import counted, say
from vit_cli.models import load_for_inference, settings
from vit_cli.predict import own_shard
from vit_cli.progress import Progress
from vit_cli.sources import find_images


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
    hub: Mapping[str, Any] | None = None,
) -> int:
    """Write the features of image files into one file.

    Args:
        names: image files, and folders of them.
        model: folder, weights file or Hub name, with a classifier or without; None is the
            checkpoint in the package.
        output: see `vit_cli.feature_file`.
        layers, pool: as `ImageEncoder.features`.
        store_dtype: of the numbers in the file.
        batch_size, dtype, resume, force, shard, hub: as `vit_cli.predict.predict`.

    Returns:
        The exit code: 1 if an image failed or a folder held none.

    Raises:
        ViTError: the model cannot be loaded, or the file not be written.
    """
    failed = 0

    def report(text: str) -> None:
        nonlocal failed
        failed += 1
        say("error", text)

    files = list(dict.fromkeys(find_images(names, report)))
    if not files:
        return SOME_FAILED
    if shard is not None:
        files = own_shard(files, *shard)
    run = {
        **settings(model, dtype, hub, shard),
        "layers": list(layers),
        "pool": pool,
        "store_dtype": store_dtype,
    }
    target = FeatureFile(output, dtype=store_dtype, resume=resume, force=force, run=run)
    with interrupt.exits_after(target.close), closing(target):
        failed += target.failed
        total = len(files)
        files = [file for file in files if file not in target.done]
        if len(files) < total:
            say(f"{total - len(files)} of {total} images are done already")
        try:
            if files:
                encoder = load_for_inference("ImageEncoder", model, dtype, hub)
                batch_size = batch_size or encoder.default_batch_size
                results = encoder.stream_features(files, layers, pool, batch_size)
                failed += _write(results, target, len(files), batch_size)
            target.finish()
        except KeyboardInterrupt:
            return INTERRUPTED
    shape = " x ".join(map(str, (target.count, *target.shape)))
    say(f"wrote {output}: {shape} {store_dtype}")
    return SOME_FAILED if failed else DONE


def _write(results: Any, target: FeatureFile, total: int, batch_size: int) -> int:
    """Write the results of a stream.

    Returns:
        How many images failed.

    Raises:
        KeyboardInterrupt: it was interrupted; that is said.
    """
    done = failed = 0
    rich = importlib.util.find_spec("rich") is not None
    with Progress(total, show=rich, what="features") as progress:
        try:
            with interrupt.raises() as asked, closing(results):
                for result in results:
                    if asked():
                        raise KeyboardInterrupt
                    error = result.error
                    if error is None:
                        error = target.write(result.source, result.value)
                    else:
                        target.fail(result.source, str(error))
                    if error is not None:
                        failed += 1
                        progress.say("error", str(error))
                    done += 1
                    if done % batch_size == 0:  # they come a batch at a time
                        target.flush()
                        progress.advance(batch_size)
        except KeyboardInterrupt:
            with progress.hidden():
                target.flush()
                how = "; --resume goes on from there" if done or target.done else ""
                say(f"interrupted: {done} of {counted(total)} done{how}")
            raise
    return failed
