"""Everything the converter knows about a format is a field of `Format`, rows of its table included.

Code outside this folder asks those fields and never compares names of formats.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError
from vit_common.images.processor import BaseImageProcessor
from vit_common.parameters import Head
from vit_common.positions import RelativeRule
from vit_convert.layouts import KEEP, Layout

PREFIXES = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vision_model")
"""What models with a head put before the names of the network under it, one for each family (CLIP:
every model)."""


@dataclass(frozen=True)
class Rule:
    """One row of a format's table: which foreign keys hold which canonical parameters.

    `{i}` in a name stands for the index of a block, `{j}` for that of a part of the block. Several
    names on either side belong together through the layout.
    """

    foreign: str | tuple[str, ...]
    canonical: str | tuple[str, ...]
    layout: Layout = KEEP

    @property
    def foreign_names(self) -> tuple[str, ...]:
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign

    @property
    def canonical_names(self) -> tuple[str, ...]:
        return (self.canonical,) if isinstance(self.canonical, str) else self.canonical


def fill(name: str, index: str | None) -> str:
    """A name with the index of its block, "3", or of its block and part, "3 1"."""
    if index is None:
        return name
    block, _, part = index.partition(" ")
    return name.replace("{i}", block).replace("{j}", part)


@dataclass(frozen=True)
class Files:
    """How the files of a format lie on a disk.

    Attributes:
        container: what a folder in this format holds its weights in.
        stem: name of the weights file in a folder, without its suffix.
        tag: value of "format" in the metadata of safetensors files; None writes none in a folder.
        suffix: suffix of a single file that means this format where none is named.
        for_suffix: suffix of a single file -> name of the format that is meant there when this one
            is named.
        wrapper: key that a pickle of this format has around the weights.
        described: whether the files are never without a `config.json` in the Hub's words.
        config: the format's own text for `config.json`, from the configuration, the format's own
            file at the source if there was one, and the image processor; None writes the Hub's.
    """

    container: Literal["safetensors", "msgpack", "npz", "torch", "hdf5"] = "torch"
    stem: str = "model"
    tag: str | None = None
    suffix: str | None = None
    for_suffix: Mapping[str, str] = field(default_factory=dict)
    wrapper: str | None = None
    described: bool = False
    config: Callable[[ViTConfig, Mapping[str, Any] | None, Any], str] | None = None

    @property
    def metadata(self) -> dict[str, str] | None:
        """What a safetensors file of this format says of itself; None in other containers."""
        return {"format": self.tag} if self.tag and self.container == "safetensors" else None


class Found(NamedTuple):
    """What is known of a file when its format is detected.

    Attributes:
        keys: names in it, without what stands before all of them.
        root: what that is ("", "model/", "teacher/backbone.", ...).
        suffix: of the file's name.
        architecture: timm's name in a `config.json` beside it, or "".
    """

    keys: tuple[str, ...]
    root: str = ""
    suffix: str = ""
    architecture: str = ""

    def has(self, pattern: str) -> bool:
        """Whether a key is matched, whole, by a regular expression."""
        return any(re.fullmatch(pattern, key) for key in self.keys)


class Clue(NamedTuple):
    """A sign that distinguishes a format from others with all the same names.

    Attributes:
        rank: of several formats with a clue that holds, the one with the lowest rank is meant.
        holds: whether a file has it.
    """

    rank: int
    holds: Callable[[Found], bool]


class Published(NamedTuple):
    """A network that was published in a format whose files do not say its number of heads.

    Attributes:
        name: for messages.
        width, depth, inner: D, L, and the width of the MLP.
        heads: number of attention heads.
        positions: its positions (N, D), from (rows, columns) of patches and the width, where they
            are not learned.
        class_token: whether it has one.
        gated: whether its MLP is a SwiGLU.
    """

    name: str
    width: int
    depth: int
    inner: int
    heads: int
    positions: Callable[[tuple[int, int], int], np.ndarray] | None = None
    class_token: bool = True
    gated: bool = False


Implied = tuple[BaseImageProcessor, str]
"""An image processor, and what says that it is the one."""


@dataclass(frozen=True)
class Format:
    """All that is known of a checkpoint layout of one family.

    Attributes:
        name: how users call the layout; several families can have one of that name.
        rules: the table. Canonical names are without what a model with a head puts before the
            names of the network under it ("vit.", "deit.", ...).
        families: `model_type` of the configurations whose weights it holds.
        files: how its files lie on a disk.
        separator: what stands between the parts of a foreign key.
        prefixed: whether foreign files of a model with a head put the family's prefix before the
            names of the network under it; read with and without.
        only_with_prefix: (start of a key, its replacement) for keys of a head that have the name of
            a parameter of the network, and differ by having no prefix.
        respelled: (pattern, replacement) for keys with a part that says nothing.
        ignored: (pattern, reason) of keys that hold no weights of the network.
        requires: foreign names without which a file is not in this format.
        lacks: foreign names with which a file is not in this format.
        refuses: (pattern, what it is) of keys of networks that no model here is.
        parts: (pattern, what it is) of keys that change the network and that no model here has.
        clues: signs that distinguish it from formats with the same names.
        candidate: whether it is named in the error where no sign decides between formats.
        settings: fields of the config that networks in this format have, where they differ from
            the defaults of the family.
        says: the fields that constants in a file say, from its tensors by their names there.
        unsaid: fields that networks with such weights differ in and that the weights do not show,
            from the shapes of the weights by canonical name; they are asked for where no file says
            them.
        stem: `settings` of networks with a stem before their patches.
        relative_resize: how relative positions of networks in this format are resampled.
        positions: positions (N, D) of networks whose files hold none, from (rows, columns) of
            patches and the width; None where files hold them or the family has none.
        published: networks whose number of heads the files do not say.
        image_size: of published networks, where files say none.
        imagenet: whether a head of 1000 classes has those of ImageNet-1k, in its order.
        preprocessing: how images are prepared for networks in this format; None where that is
            not the same for all.
        root: what files in this format have before every name.
        named: whether timm's name of a network, where one is known, can be of this table.
        signs: patterns of keys, one of which a file has whose timm's name is not known; empty for
            any file.
        written: whether files in this format can be written.
        fits: whether it is this table that writes a network with a head, where several could.
        for_writing: the table, as a function of itself, for writing that network, where rows depend
            on what it is.
        structured: whether the format's own `config.json` says how blocks are put together, and
            whether they rotate.
        cannot_hold: what keeps the format's own library from loading a network, or None.
        loses: what its own library does not take from the files; one line each. The second
            argument says whether the format's own `config.json` is kept.
        describes: one line for messages.
    """

    name: str
    rules: tuple[Rule, ...]
    families: tuple[str, ...] = ("vit",)
    files: Files = Files()
    separator: str = "."
    prefixed: bool = False
    only_with_prefix: tuple[tuple[str, str], ...] = ()
    respelled: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    requires: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    refuses: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    clues: tuple[Clue, ...] = ()
    candidate: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    says: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    unsaid: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    stem: Mapping[str, Any] = field(default_factory=dict)
    relative_resize: RelativeRule = "bilinear"
    positions: Callable[[tuple[int, int], int], np.ndarray] | None = None
    published: tuple[Published, ...] = ()
    image_size: int | None = None
    imagenet: bool = False
    preprocessing: Callable[[ViTConfig], Implied | None] | None = None
    root: str = ""
    named: Callable[[str], bool] | None = None
    signs: tuple[str, ...] = ()
    written: bool = True
    fits: Callable[[ViTConfig, Head | None], bool] | None = None
    for_writing: Callable[[Format, ViTConfig], Format] | None = None
    structured: bool = False
    cannot_hold: Callable[[ViTConfig], str | None] | None = None
    loses: Callable[[ViTConfig, bool], Iterable[str]] | None = None
    describes: str = ""

    @cached_property
    def _by_foreign(self) -> dict[str, Rule]:
        return {name: rule for rule in self.rules[::-1] for name in rule.foreign_names}

    @cached_property
    def _by_canonical(self) -> dict[str, Rule]:
        return {name: rule for rule in self.rules[::-1] for name in rule.canonical_names}

    def rule_for_foreign(self, key: str) -> tuple[Rule, str | None] | None:
        """The rule and the block index for a foreign key without wrapper and prefix."""
        return _lookup(self._by_foreign, key)

    def rule_for_canonical(self, name: str) -> tuple[Rule, str | None] | None:
        """The rule and the block index for a canonical name without prefix."""
        return _lookup(self._by_canonical, name)

    def why_ignored(self, key: str) -> str | None:
        """Why a foreign key without prefix is left aside, or None."""
        return _matched(self.ignored, key)

    def part_of(self, key: str) -> str | None:
        """What in the network a foreign key without prefix belongs to, which no model here has."""
        return _matched(self.parts, key)

    def strip(self, keys: Iterable[str]) -> dict[str, str]:
        """Key as the table has it -> key as the file has it.

        Raises:
            CheckpointError: two keys of the file become the same.
        """
        keys = list(keys)
        prefix = family_prefix(keys, self.separator) if self.prefixed else ""
        out: dict[str, str] = {}
        twice: list[str] = []
        for key in keys:
            bare = key.removeprefix(prefix)
            if prefix and bare == key:
                for start, replacement in self.only_with_prefix:
                    if bare.startswith(start):
                        bare = replacement + bare[len(start) :]
            for pattern, replacement in self.respelled:
                bare = re.sub(pattern, replacement, bare)
            if bare in out:
                twice.append(f"{out[bare]!r} and {key!r}")
            out[bare] = key
        if twice:
            raise CheckpointError(f"two keys name the same parameter: {'; '.join(twice)}.")
        return out


def _matched(table: tuple[tuple[str, str], ...], key: str) -> str | None:
    return next((what for pattern, what in table if re.fullmatch(pattern, key)), None)


def family_prefix(keys: Iterable[str], separator: str) -> str:
    """What a model with a head put before its network's names: "vit.", "deit.", ...; or ""."""
    for key in keys:
        start = key.partition(separator)[0]
        if start in PREFIXES:
            return start + separator
    return ""


def unprefixed(name: str) -> str:
    """A canonical name without what a model with a head puts before it."""
    start, dot, rest = name.partition(".")
    return rest if dot and start in PREFIXES else name


# A part of a name that is the index of a block.
_INDEX = re.compile(r"(?<![^./_])(0|[1-9]\d{0,4})(?![^./])")


def _lookup(table: Mapping[str, Rule], key: str) -> tuple[Rule, str | None] | None:
    """The rule for a name, and the index that stands at its `{i}`, or both at `{i}` and `{j}`."""
    if key in table:
        return (table[key], None) if "{i}" not in key else None
    matches = list(_INDEX.finditer(key))
    for match in matches:
        rule = table.get(f"{key[: match.start()]}{{i}}{key[match.end() :]}")
        if rule is not None:
            return rule, match[1]
    for first, second in itertools.combinations(matches, 2):
        between = key[first.end() : second.start()]
        rule = table.get(f"{key[: first.start()]}{{i}}{between}{{j}}{key[second.end() :]}")
        if rule is not None:
            return rule, f"{first[1]} {second[1]}"
    return None
