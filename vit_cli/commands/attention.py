"""`vit attention`: where a network looks, as a heat map over the photo."""

from __future__ import annotations

import math
from pathlib import Path

from vit_cli.models import load_for_inference, mention_digits
from vit_cli.options import Options, Parser, Reading, add_model, add_pixel_limit, add_reading
from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.messages import say
from vit_common.errors import InputError, MissingFileError

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SIDE = 384


def add_options(parser: Parser) -> None:
    parser.usage = "vit attention [options] IMAGE --output FILE"
    parser.description = (
        "Draw what the class token attends to, over the image as the model sees it: the image, "
        "the mean of the heads and each head of a block; or a single head, or all blocks together."
    )
    parser.add_names("IMAGE", "image file", least=1, most=1, wanted="one image")
    add_model(parser)
    parser.add_argument("--output", metavar="FILE", help=".png, .jpg or .webp file to write")
    parser.add_argument(
        "--layer", metavar="L", type=int, help="block, the first is 0 (default: -1, the last)"
    )
    parser.add_argument("--head", metavar="H", type=int, help="draw this head only")
    parser.add_argument(
        "--rollout",
        action="store_true",
        help="attention rollout over all blocks (Abnar and Zuidema 2020)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    add_pixel_limit(parser)
    add_reading(parser)

    def check(options: Options) -> None:
        if options.output is None:
            parser.error("--output FILE is needed")
        if options.rollout and options.head is not None:
            parser.error("--rollout takes all heads together; leave --head out")
        if options.rollout and options.layer is not None:
            parser.error("--rollout takes all blocks together; leave --layer out")

    parser.checks.append(check)


def run(options: Options) -> int:
    """Write a picture of what the class token attends to.

    With `--head` or `--rollout` it is one heat map over the image as the model sees it; else a
    sheet: that image, the mean of the heads, and each head.

    Raises:
        ViTError: the image or the model cannot be used, or the file not be written.
    """
    from vit_common.files.replace import check_target, replace_files
    from vit_common.files.texts import reason
    from vit_common.images.pictures import load_image

    target, head = Path(options.output), options.head
    layer = -1 if options.layer is None else options.layer
    if target.suffix.lower() not in _FORMATS:
        raise InputError(f"--output must end in {', '.join(_FORMATS)}; given {options.output!r}.")
    check_target(target, force=options.force)
    picture = load_image(options.names[0])

    from vit_flax.inference.maps import contact_sheet, overlay, patch_map

    if options.model is None:
        mention_digits(options.names)
    encoder = load_for_inference(
        "ImageEncoder", options.model, options.dtype, devices=1, **Reading.of(options).keywords
    )
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
    if options.rollout:
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
