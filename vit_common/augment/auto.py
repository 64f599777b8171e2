"""AutoAugment (arXiv:1805.09501), RandAugment (arXiv:1909.13719), AugMix (arXiv:1912.02781) and
3-Augment (DeiT III, arXiv:2204.07118), by the names and with the definitions of timm 1.0.31."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vit_common.augment.draws import Draws, gauss, uniform
from vit_common.augment.operations import FULL, OPERATIONS, Setting
from vit_common.errors import InputError, shown

Augmentation = Callable[[PIL.Image.Image, Draws], PIL.Image.Image]


@dataclass(frozen=True)
class Operation:
    """One operation, applied with a probability and a magnitude that may be random.

    Attributes:
        name: one of `OPERATIONS`.
        probability: of being applied at all.
        magnitude: 0 to 10, or to `most`.
        spread: standard deviation of the magnitude; infinite means uniform from 0 to `magnitude`.
        most: largest magnitude.
    """

    name: str
    probability: float
    magnitude: float
    setting: Setting
    spread: float = 0.0
    most: float = FULL

    def __call__(self, image: PIL.Image.Image, source: Draws) -> PIL.Image.Image:
        if self.probability < 1 and source.random() > self.probability:
            return image
        magnitude = self.magnitude
        if self.spread == math.inf:
            magnitude = uniform(source, 0, magnitude)
        elif self.spread > 0:
            magnitude = gauss(source, magnitude, self.spread)
        magnitude = max(0.0, min(magnitude, self.most))
        level, change = OPERATIONS[self.name]
        strength = None if level is None else level(magnitude, self.setting, source)
        return change(image, strength, self.setting, source)


# -- AutoAugment: one of a list of pairs

_ORIGINAL = """
    PosterizeOriginal .4 8, Rotate .6 9;  Solarize .6 5, AutoContrast .6 5
    Equalize .8 8, Equalize .6 3;         PosterizeOriginal .6 7, PosterizeOriginal .6 6
    Equalize .4 7, Solarize .2 4;         Equalize .4 4, Rotate .8 8
    Solarize .6 3, Equalize .6 7;         PosterizeOriginal .8 5, Equalize 1 2
    Rotate .2 3, Solarize .6 8;           Equalize .6 8, PosterizeOriginal .4 6
    Rotate .8 8, Color .4 0;              Rotate .4 9, Equalize .6 2
    Equalize 0 7, Equalize .8 8;          Invert .6 4, Equalize 1 8
    Color .6 4, Contrast 1 8;             Rotate .8 8, Color 1 2
    Color .8 8, Solarize .8 7;            Sharpness .4 7, Invert .6 8
    ShearX .6 5, Equalize 1 9;            Color .4 0, Equalize .6 3
    Equalize .4 7, Solarize .2 4;         Solarize .6 5, AutoContrast .6 5
    Invert .6 4, Equalize 1 8;            Color .6 4, Contrast 1 8
    Equalize .8 8, Equalize .6 3
"""
_V0 = """
    Equalize .8 1, ShearY .8 4;       Color .4 9, Equalize .6 3
    Color .4 1, Rotate .6 8;          Solarize .8 3, Equalize .4 7
    Solarize .4 2, Solarize .6 2;     Color .2 0, Equalize .8 8
    Equalize .4 8, SolarizeAdd .8 3;  ShearX .2 9, Rotate .6 8
    Color .6 1, Equalize 1 2;         Invert .4 9, Rotate .6 0
    Equalize 1 9, ShearY .6 3;        Color .4 7, Equalize .6 0
    Posterize .4 6, AutoContrast .4 7;  Solarize .6 8, Color .6 9
    Solarize .2 4, Rotate .8 9;       Rotate 1 7, TranslateYRel .8 9
    ShearX 0 0, Solarize .8 4;        ShearY .8 0, Color .6 4
    Color 1 0, Rotate .6 2;           Equalize .8 4, Equalize 0 8
    Equalize 1 4, AutoContrast .6 2;  ShearY .4 7, SolarizeAdd .6 7
    Posterize .8 2, Solarize .6 10;   Solarize .6 8, Equalize .6 1
    Color .8 6, Rotate .4 5
"""
_POLICIES = {
    "original": _ORIGINAL,
    "originalr": _ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing"),
    "v0": _V0,
    "v0r": _V0.replace("Posterize", "PosterizeIncreasing"),
    "3a": "Solarize 1 5; Desaturate 1 10; GaussianBlurRand 1 10",
}


def _auto(name: str, options: dict[str, str], setting: Setting) -> Augmentation:
    spread = _number(name, options, "mstd", 0.0)
    policy = [
        [
            Operation(kind, float(probability), float(magnitude), setting, spread)
            for kind, probability, magnitude in (one.split() for one in pair.split(","))
        ]
        for pair in re.split(r"[;\n]", _POLICIES[name.partition("-")[0]])
        if pair.strip()
    ]

    def augment(image: PIL.Image.Image, source: Draws) -> PIL.Image.Image:
        for operation in policy[int(source.random() * len(policy))]:
            image = operation(image, source)
        return image

    return augment


# -- RandAugment: some of all operations

_COMMON = ("AutoContrast", "Equalize", "Invert", "Rotate")
_MOVES = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_CHANGES = ("Color", "Contrast", "Brightness", "Sharpness")
_RAND = (*_COMMON, "Posterize", "Solarize", "SolarizeAdd", *_CHANGES, *_MOVES)
_INCREASING = (
    *_COMMON,
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    *(f"{name}Increasing" for name in _CHANGES),
    *_MOVES,
)
_SETS: dict[str, dict[str, float] | tuple[str, ...]] = {
    "3a": ("SolarizeIncreasing", "Desaturate", "GaussianBlur"),
    "3aw": {
        "SolarizeIncreasing": 6,
        "Desaturate": 6,
        "GaussianBlur": 6,
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "PosterizeIncreasing": 1,
        "AutoContrast": 1,
        "ColorIncreasing": 1,
        "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1,
        "BrightnessIncreasing": 1,
        "Equalize": 1,
        "Invert": 1,
    },
    "weights": {
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "TranslateXRel": 1,
        "TranslateYRel": 1,
        "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25,
        "AutoContrast": 0.25,
        "SolarizeIncreasing": 0.05,
        "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05,
        "BrightnessIncreasing": 0.05,
        "Equalize": 0.05,
        "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
}


def _rand(name: str, options: dict[str, str], setting: Setting) -> Augmentation:
    magnitude = _number(name, options, "m", FULL, whole=True)
    count = int(_number(name, options, "n", 2, whole=True))
    probability = _number(name, options, "p", 0.5)
    spread = _number(name, options, "mstd", 0.0)
    most = _number(name, options, "mmax", 0, whole=True) or FULL
    increasing = bool(_number(name, options, "inc", 0, whole=True))
    chosen: Any = _INCREASING if increasing else _RAND
    if "t" in options:
        chosen = _SETS.get(options["t"], chosen)
        if options["t"] not in _SETS:
            raise InputError(
                f"`auto_augment` {shown(name)}: no set of operations {options['t']!r}; wanted one "
                f"of {', '.join(_SETS)}."
            )
    operations = [
        Operation(kind, probability, magnitude, setting, math.inf if spread > 100 else spread, most)
        for kind in chosen
    ]
    weights = np.array(list(chosen.values()), float) if isinstance(chosen, dict) else None
    if weights is not None and count > len(weights):
        raise InputError(
            f"`auto_augment` {shown(name)}: {count} different operations of {len(weights)}; wanted "
            f"n{len(weights)} or fewer."
        )

    def augment(image: PIL.Image.Image, source: Draws) -> PIL.Image.Image:
        for place in _choose(len(operations), count, weights, source):
            image = operations[place](image, source)
        return image

    return augment


def _choose(n: int, count: int, weights: np.ndarray | None, source: Draws) -> Sequence[int]:
    """Places of `count` of `n` operations: with replacement, or with weights and without."""
    if weights is None:
        return [int(source.random() * n) for _ in range(count)]
    left = weights.copy()
    places = []
    for _ in range(count):
        total = np.cumsum(left)
        place = int(np.searchsorted(total, source.random() * total[-1], side="right"))
        places.append(place)
        left[place] = 0
    return places


# -- AugMix: several chains, mixed

_AUGMIX = (
    "AutoContrast",
    *(f"{name}Increasing" for name in _CHANGES),
    "Equalize",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    *_MOVES,
)


def _augmix(name: str, options: dict[str, str], setting: Setting) -> Augmentation:
    magnitude = _number(name, options, "m", 3, whole=True)
    width = int(_number(name, options, "w", 3, whole=True))
    depth = int(_number(name, options, "d", 0, whole=True))
    spread = _number(name, options, "mstd", math.inf)
    operations = [Operation(kind, 1.0, magnitude, setting, spread) for kind in _AUGMIX]

    def augment(image: PIL.Image.Image, source: Draws) -> PIL.Image.Image:
        # Dirichlet and beta of parameters 1: exponential numbers by their sum, and uniform.
        parts = np.array([-math.log(1.0 - source.random()) for _ in range(width)])
        weights = (parts / parts.sum()).astype(np.float32)
        share = np.float32(source.random())
        mixed: Any = np.zeros_like(image, dtype=np.float32)
        for weight in weights:
            length = depth if depth > 0 else 1 + int(source.random() * 3)
            chain = image
            for place in _choose(len(operations), length, None, source):
                chain = operations[place](chain, source)
            mixed += weight * np.asarray(chain, np.float32)
        mixed = PIL.Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
        return PIL.Image.blend(image, mixed, float(share))

    return augment


# -- names

_KINDS: dict[str, tuple[Callable[..., Augmentation], tuple[str, ...]]] = {
    "rand": (_rand, ("m", "n", "p", "mstd", "mmax", "inc", "t")),
    "augmix": (_augmix, ("m", "w", "d", "mstd")),
    **dict.fromkeys(_POLICIES, (_auto, ("mstd",))),
}


def auto_augment(
    name: str,
    *,
    size: tuple[int, int],
    fill: int | tuple[int, ...] = (128, 128, 128),
    resample: PIL.Image.Resampling | None = None,
) -> Augmentation:
    """An augmentation by timm's name for it.

    Args:
        name: "rand" (RandAugment), "original", "originalr", "v0", "v0r" (AutoAugment), "augmix" or
            "3a" (3-Augment), with options after hyphens: "rand-m9-mstd0.5-inc1" is RandAugment of
            magnitude 9, with a standard deviation of 0.5, and operations that grow stronger with
            the magnitude; also n (operations), p (probability of each), mmax, and t (a set of
            operations: t3a, t3aw, tweights); for "augmix" m, w (width), d (depth) and mstd.
        size: (height, width) of the images.
        fill: colour of what a shear, shift or rotation leaves empty.
        resample: filter of these; None is bilinear or bicubic at random.

    Raises:
        InputError: no such name or option.

    Example:
        >>> augment = auto_augment("rand-m9-mstd0.5-inc1", size=(224, 224))
        >>> image = augment(image, draws(seed=0, epoch=3, index=17))
    """
    kind, *sections = name.split("-")
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(
            f"`auto_augment` {shown(name)}: no augmentation {shown(kind)}.{hint} Wanted one of "
            f"{', '.join(_KINDS)}, with options as in rand-m9-mstd0.5-inc1."
        )
    make, known = _KINDS[kind]
    options = {}
    for section in sections:
        match = re.fullmatch(r"(t)(\w+)|([a-z]+)([0-9.]+|inf)", section)
        key = match and (match[1] or match[3])
        if match is None or key not in known:
            raise InputError(
                f"`auto_augment` {shown(name)}: no option {shown(section)}; {kind} has "
                f"{', '.join(known)}, each with its value, as in rand-m9-mstd0.5-inc1."
            )
        options[str(key)] = match[2] or match[4]
    share = 0.3 if kind == "augmix" else 0.45
    setting = Setting(fill, resample, int(min(size) * 0.45), share)
    return make(name, options, setting)


def _number(
    name: str, options: dict[str, str], key: str, default: float, *, whole: bool = False
) -> float:
    text = options.get(key)
    if text is None:
        return default
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        kind = "a whole number" if whole else "a number"
        raise InputError(
            f"`auto_augment` {shown(name)}: the value of {key} must be {kind}; given {text!r}."
        ) from error
