"""What timm's names of networks mean, asked of timm itself, and the module that holds it.

    python tests/timm_table.py   # writes convert/formats/timm/models.py anew

Each of timm's functions for a name calls `build_model_with_cfg` with a class and its arguments;
here that call is answered with an exception, and no network is built.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from timm_models import timm

PATTERNS = ("vit*", "deit*", "beit*", "flexivit*", "eva*", "naflexvit*", "samvit*", "test_vit*")

# What weights show by themselves, what is of training alone, and what says where files are.
LEFT_OUT = {
    "attn_drop_rate", "cache_dir", "depth", "device", "drop_path_rate", "drop_rate", "dtype",
    "dynamic_img_pad", "dynamic_img_size", "embed_dim", "enable_patch_interpolator", "feature_cfg",
    "fix_init", "head_init_scale", "img_size", "in_chans", "mlp_ratio", "num_classes",
    "num_heads", "num_kv_heads", "patch_drop_rate", "patch_size", "patchify_channels_last",
    "pos_drop_rate", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_filter_fn", "pretrained_strict", "proj_drop_rate", "qkv_fused", "rel_pos_dim",
    "rope_jitter_coords", "rope_rescale_coords", "rope_shift_coords", "strict_img_size",
    "swiglu_align_to", "use_key_only_attn_mask", "weight_init", "global_attn_indexes",
    "pos_embed_grid_size", "embed_proj_type",
}  # fmt: skip


_CLASSES = {
    "Beit", "Eva", "NaFlexVit", "VisionTransformer", "VisionTransformerDistilled",
    "VisionTransformerRelPos", "VisionTransformerSAM",
}  # fmt: skip


class _Asked(Exception):
    pass


@functools.cache
def arguments_of(name: str) -> tuple[str, dict[str, Any]]:
    """The class that timm builds for a name, and the arguments it builds it with."""
    answer: list[tuple[str, dict[str, Any]]] = []

    def build(cls, variant, pretrained, **arguments):
        if cls.__name__ in _CLASSES:
            answer.append((cls.__name__, arguments))
            raise _Asked
        return original(cls, variant, pretrained, **arguments)  # the stem of a hybrid

    modules = [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("timm.models") and hasattr(module, "build_model_with_cfg")
    ]
    original = timm.models.build_model_with_cfg
    for module in modules:
        module.build_model_with_cfg = build
    try:
        with torch.device("meta"):
            timm.create_model(name)
    except _Asked:
        pass
    finally:
        for module in modules:
            module.build_model_with_cfg = original
    (cls, arguments) = answer[0]
    config = arguments.pop("cfg", None)
    if dataclasses.is_dataclass(config):
        arguments = {**dataclasses.asdict(config), **arguments}  # type: ignore[arg-type]
    return cls, arguments


def _plain(key: str, value: Any) -> dict[str, Any]:
    """An argument as text, numbers and tuples."""
    if isinstance(value, functools.partial):
        name = value.func.__name__
        if name == "HybridEmbed":
            return {"embed_layer": _stem(value.keywords)}
        more = {k: v for k, v in value.keywords.items() if isinstance(v, (int, float, bool))}
        if key == "norm_layer":
            return {"norm_layer": name.lower(), "norm_eps": more["eps"]}
        return {key: name}
    if key == "norm_layer":
        name = value if isinstance(value, str) else value.__name__
        return {"norm_layer": name.lower()}
    if key == "act_layer" and not isinstance(value, str):
        return {key: value.__name__.lower()}
    if isinstance(value, type):
        return {key: value.__name__}
    if isinstance(value, list):
        value = tuple(value)
    return {key: value}


def _stem(keywords: Mapping[str, Any]) -> str:
    return type(keywords["backbone"]).__name__


def table() -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Name -> class, number of heads, and the arguments that no weight shows."""
    from timm.models.naflexvit import NaFlexVitCfg

    names = dict.fromkeys(n for pattern in PATTERNS for n in timm.list_models(pattern))
    found = {}
    classes = {
        cls.__name__: cls
        for key, module in list(sys.modules.items())
        if key.startswith("timm.models")
        for cls in vars(module).values()
        if isinstance(cls, type)
    }
    for name in names:
        cls, arguments = arguments_of(name)
        if cls == "NaFlexVit":
            defaults = {f.name: f.default for f in dataclasses.fields(NaFlexVitCfg)}
        else:
            parameters = inspect.signature(classes[cls].__init__).parameters
            if cls == "VisionTransformerDistilled":
                parameters = {
                    **inspect.signature(classes["VisionTransformer"].__init__).parameters
                } | dict(parameters)
            defaults = {key: p.default for key, p in parameters.items()}
        heads = arguments.get("num_heads", defaults["num_heads"])
        kept: dict[str, Any] = {}
        for key, value in sorted(arguments.items()):
            if key not in LEFT_OUT and value != defaults.get(key, _Asked):
                kept.update(_plain(key, value))
        found[name] = (cls, heads, kept)
    return found


def _wrapped(text: str, width: int, indent: str) -> str:
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def source() -> str:
    """The text of `convert/formats/timm/models.py`."""
    groups: dict[tuple[str, str], dict[int, list[str]]] = {}
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (cls, heads, kept) in table().items():
        key = (cls, repr(kept))
        kinds[key] = kept
        groups.setdefault(key, {}).setdefault(heads, []).append(name)
    lines = [HEADER.format(version=timm.__version__)]
    for key in sorted(groups):
        arguments = [f"{name}={_short(value)}" for name, value in kinds[key].items()]
        lines.append(_wrapped(" ".join([key[0], *arguments]), 100, ""))
        for heads, names in sorted(groups[key].items()):
            lines.append(_wrapped(f"{heads}: {' '.join(sorted(names))}", 100, "    "))
        lines.append("")
    return "\n".join(lines[:-1]) + FOOTER


def _short(value: Any) -> str:
    return repr(value).replace(" ", "")


HEADER = '''"""What timm's names of networks say that their weights do not.

Written by `tests/timm_table.py`, which asks timm {version} for the class and the arguments behind
each name; a test compares. What weights show by themselves is not here, nor what is of training
alone. Arguments are timm's own keywords, `norm_eps` aside, the epsilon that timm binds to a class.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """What timm builds for a name.

    Attributes:
        cls: name of timm's class.
        heads: number of attention heads.
        arguments: of the class, where they differ from its defaults.
    """

    cls: str
    heads: int
    arguments: Mapping[str, Any]


# Of each kind its class and arguments; then the number of heads, and the names that have it.
_KINDS = """\
'''

FOOTER = '''
"""


def _parsed(text: str) -> dict[str, Architecture]:
    found = {}
    for kind in text.split("\\n\\n"):
        cls, *words = kind.split()
        arguments, heads = {}, 0
        for word in words:
            name, equals, value = word.partition("=")
            if equals:
                arguments[name] = ast.literal_eval(value)
            elif word.endswith(":"):
                heads = int(word[:-1])
            else:
                found[word] = Architecture(cls, heads, MappingProxyType(arguments))
    return found


ARCHITECTURES: dict[str, Architecture] = _parsed(_KINDS)
"""timm's name of a network -> what it builds."""

HEADS: dict[str, int] = {name: row.heads for name, row in ARCHITECTURES.items()}
"""timm's name of a network -> number of attention heads."""
'''

PATH = Path(__file__).resolve().parent.parent / "convert" / "formats" / "timm" / "models.py"

if __name__ == "__main__":
    PATH.write_text(source())
