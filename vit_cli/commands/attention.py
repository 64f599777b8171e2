"""`vit attention`: where a network looks, as a heat map over the photo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_cli.models import load_for_inference
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.messages import say
from vit_common.errors import InputError, MissingFileError
from vit_common.files.replace import check_target, replace_files
from vit_common.files.texts import reason

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SIDE = 384


def attention(
    image: str,
    model: str | None,
    output: str,
    *,
    layer: int = -1,
    head: int | None = None,
    rollout: bool = False,
    dtype: str = "float32",
    force: bool = False,
    hub: Mapping[str, Any] | None = None,
) -> int:
    """Write a picture of what the class token looks at.

    With `head` or `rollout` it is one heat map over the image as the model sees it; else a sheet:
    that image, the mean of the heads, and each head.

    Args:
        image: file.
        model: folder, weights file or Hub name; None is the checkpoint in the package.
        output: .png, .jpg or .webp file.
        layer: block, the first is 0; -1 is the last.
        head: number of a head.
        rollout: over all blocks instead of one.
        dtype: of the computation.
        force: overwrite the file.
        hub: options of the Hub.

    Returns:
        The exit code.

    Raises:
        ViTError: the image or the model cannot be used, or the file not be written.
    """
    target = Path(output)
    if target.suffix.lower() not in _FORMATS:
        raise InputError(f"--output must end in {', '.join(_FORMATS)}; given {output!r}.")
    check_target(target, force=force)
    from vit_common.images.pictures import load_image

    picture = load_image(image)

    from vit_flax.inference.maps import contact_sheet, overlay, patch_map

    encoder = load_for_inference("ImageEncoder", model, dtype, hub, devices=1)
    config = encoder.config
    if head is not None and not 0 <= head < config.num_attention_heads:
        raise InputError(
            f"--head must be from 0 to {config.num_attention_heads - 1}; given {head}."
        )
    L = config.num_hidden_layers
    if not -L <= layer < L:
        raise InputError(f"--layer must be from 0 to {L - 1}, or from {-L} to -1; given {layer}.")
    seen = encoder.seen(picture)
    P, (height, width) = config.patch_height_width, encoder.image_size
    grid = (height // P[0], width // P[1])
    scale = max(1, round(_SIDE / max(seen.size)))
    seen = seen.resize((seen.width * scale, seen.height * scale), 0 if scale > 4 else 2)
    prefix = config.num_prefix_tokens
    if rollout:
        sheet = overlay(seen, patch_map(encoder.attention(picture, rollout=True), grid, prefix))
        what = "rollout over all blocks"
    else:
        maps = patch_map(encoder.attention(picture, [layer])[0], grid, prefix)  # (A, h, w)
        if head is not None:
            sheet = overlay(seen, maps[head])
            what = f"block {layer % L}, head {head}"
        else:
            tiles = [seen, overlay(seen, maps.mean(axis=0)), *(overlay(seen, m) for m in maps)]
            columns = len(tiles) if len(tiles) <= 6 else math.ceil(1.3 * math.sqrt(len(tiles)))
            heads = (f"head {i}" for i in range(config.num_attention_heads))
            sheet = contact_sheet(tiles, columns, ["image", "mean of the heads", *heads])
            what = (
                f"block {layer % L}: the image, the mean of the heads, "
                f"heads 0 to {config.num_attention_heads - 1}"
            )
    try:
        replace_files(
            target.parent,
            {target.name: lambda stream: sheet.save(stream, _FORMATS[target.suffix.lower()])},
        )
    except OSError as error:
        raise MissingFileError(f"{target}: cannot be written ({reason(error)}).") from error
    say(f"wrote {target}: {what}")
    return DONE
