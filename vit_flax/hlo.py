"""What is in a compiled program, read from the compiler's text (HLO): matrix products and their
operations, wide dtypes, communication between devices, and the package's own kernels.

The text is XLA's own and no promise: tests compile programs and compare what is read here with
XLA's cost analysis.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from vit_flax.attention.tpu import NEEDED

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:([a-z]\w*)\[([\d,]*)\]\S*|\(.*?\)) ([\w\-]+)\((.*)$"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_CALLED_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
_OPERATION = re.compile(r'op_name="([^"]*)"')
_OWN = re.compile(rf'op_name="[^"]*/({"|".join(sorted(NEEDED, key=len, reverse=True))})/[^"]*"')
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_POSITIONS = ("Hh,Ww,", "/relative_position_bias/")
"""In the names of the only float32 products that are meant, which no image is part of: positions,
resampled (`model.py`), and biases computed from offsets (`parts/relative.py`)."""


class _Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class _Instruction(NamedTuple):
    name: str
    result: _Array | None
    opcode: str
    rest: str


@lru_cache(maxsize=2)
def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation of an HLO module, and the name of its entry."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in hlo.splitlines():
        opened = None if line.startswith(" ") else _COMPUTATION.match(line)
        if opened:
            current = computations.setdefault(opened[1], [])
            entry = opened[1] if line.startswith("ENTRY ") else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            name, dtype, dims, opcode, rest = found.groups()
            shape = tuple(map(int, dims.split(","))) if dims else ()
            result = _Array(dtype, shape) if dtype else None
            current.append(_Instruction(name, result, opcode, rest))
    return computations, entry


def _arrays(hlo: str) -> dict[str, _Array]:
    return {
        each.name: each.result
        for instructions in _parse(hlo)[0].values()
        for each in instructions
        if each.result is not None
    }


def _operands(instruction: _Instruction, arrays: Mapping[str, _Array]) -> list[_Array]:
    return [arrays[name] for name in _NAME.findall(instruction.rest.split(")", 1)[0])]


def product_flops(hlo: str) -> float:
    """Floating point operations of the matrix products and convolutions of an optimized module,
    two for each multiply-add; loops whose number of rounds can be read count each round, and the
    package's own kernels what they say of themselves."""
    computations, entry = _parse(hlo)
    arrays = _arrays(hlo)

    @cache
    def total(name: str) -> float:
        flops = 0.0
        for each in computations.get(name, ()):
            if each.opcode in ("dot", "convolution"):
                flops += _product_flops(each, arrays)
                continue
            if each.opcode == "custom-call":
                flops += sum(own_kernels(each.rest))
                continue
            called = _CALLED.findall(each.rest)
            for names in _CALLED_LIST.findall(each.rest):
                called += _NAME.findall(names)
            rounds = _rounds(each, computations) if each.opcode == "while" else 1
            flops += rounds * sum(map(total, called))
        return flops

    return total(entry)


def _rounds(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
    """Rounds of a loop: as the compiler states them, or of a counter from 0 that grows by a
    constant up to another; 1 where neither is so."""
    if stated := _TRIPS.search(loop.rest):
        return int(stated[1])
    parts = {kind: re.search(rf"{kind}=%([\w.\-]+)", loop.rest) for kind in ("condition", "body")}
    if not all(parts.values()):
        return 1
    test, body = (computations.get(found[1], []) for found in parts.values() if found)
    if not test or not body or test[-1].opcode != "compare" or "direction=LT" not in test[-1].rest:
        return 1
    names = {each.name: each for each in (*test, *body)}
    place = bound = None
    for name in _NAME.findall(test[-1].rest.split(")", 1)[0]):
        each = names[name]
        if each.opcode == "constant":
            bound = int(each.rest.split(")", 1)[0])
        elif each.opcode == "get-tuple-element" and (found := re.search(r"index=(\d+)", each.rest)):
            place = int(found[1])
    grown = _NAME.findall(body[-1].rest.split(")", 1)[0])
    if place is None or bound is None or place >= len(grown):
        return 1
    counter = names.get(grown[place])
    if counter is None or counter.opcode != "add":
        return 1
    operands = [names.get(name) for name in _NAME.findall(counter.rest.split(")", 1)[0])]
    steps = [int(x.rest.split(")", 1)[0]) for x in operands if x and x.opcode == "constant"]
    return -(-bound // steps[0]) if len(steps) == 1 and steps[0] > 0 else 1


def _product_flops(product: _Instruction, arrays: Mapping[str, _Array]) -> float:
    left, right = _operands(product, arrays)
    assert product.result is not None
    if product.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        summed = [left.shape[int(dim)] for dim in dims[1].split(",") if dim] if dims else []
        return 2.0 * math.prod(product.result.shape) * math.prod(summed)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", product.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = {
        kind: int(found[1]) if (found := re.search(rf"{kind}=(\d+)", product.rest)) else 1
        for kind in ("feature_group_count", "batch_group_count")
    }
    count = 2.0 * left.shape[labels[1].index("f")] / groups["feature_group_count"]
    count *= left.shape[labels[1].index("b")] / groups["batch_group_count"]
    count *= product.result.shape[labels[3].index("f")]
    spatial = sorted(label for label in labels[1] if label.isdigit())
    for i, label in enumerate(spatial):

        def option(name: str, default: str, i: int = i) -> str:
            return options[name].split("x")[i] if name in options else default

        count *= _positions(
            left.shape[labels[1].index(label)],
            right.shape[labels[2].index(label)],
            product.result.shape[labels[3].index(label)],
            int(option("stride", "1")),
            int(option("pad", "0_0").split("_")[0]),
            int(option("lhs_dilate", "1")),
            int(option("rhs_dilate", "1")),
        )
    return count


@cache
def _positions(
    size: int, kernel: int, outputs: int, stride: int, before: int, dilate: int, spread: int
) -> int:
    """Pairs of a kernel's tap and an output that meet an element of the input: neither the padding
    nor a hole between dilated elements. (The compiler turns batched products into convolutions
    whose taps meet nothing but holes, one excepted.)"""
    place = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None, :] * spread - before
    inside = (place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)
    return int(inside.sum())


def float32_products(hlo: str) -> list[str]:
    """Names of the matrix products and convolutions of an optimized module that have a float32 (or
    float64) operand, those of positions left out."""
    arrays = _arrays(hlo)
    found = []
    for instructions in _parse(hlo)[0].values():
        for each in instructions:
            if each.opcode not in ("dot", "convolution"):
                continue
            name = _OPERATION.search(each.rest)
            wide = any(operand.dtype in ("f32", "f64") for operand in _operands(each, arrays))
            if wide and not (name and any(part in name[1] for part in _POSITIONS)):
                found.append(name[1] if name else each.name)
    return found


def float64_operations(stablehlo: str, hlo: str) -> list[str]:
    """Operations with a float64 result or operand, as the program was written and as it was
    optimized: the TPU compiler makes pairs of float32 of them, so the second alone shows none."""
    found = []
    for line in stablehlo.splitlines():
        operation = re.search(r"\b((?:stablehlo|chlo|func)\.\w+|call)\b", line)
        if "f64>" in line and operation:
            found.append(operation[1])
    for line in hlo.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction and instruction[2] == "f64":
            found.append(instruction[4])
    return list(dict.fromkeys(found))


def collectives(hlo: str) -> dict[str, int]:
    """How many collective operations of each kind an optimized module has."""
    return dict(Counter(_COLLECTIVE.findall(hlo)))


class Exchange(NamedTuple):
    """Communication between devices.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce", ...; or "all-gather ring" and
            "reduce-scatter ring", which the compiler makes of the first two where each part is sent
            on while a matrix product uses the last.
        elements: of the largest array that comes out; 0 of a ring.
        name: of the operation in the program.
    """

    kind: str
    elements: int
    name: str


_RING = re.compile(r"windowed_dot_general_body_(ag|rs)")
_RINGS = {"ag": "all-gather ring", "rs": "reduce-scatter ring"}


def exchanges(hlo: str) -> list[Exchange]:
    """The communication of an optimized module, each once, however many parts the compiler divides
    it into. (A ring's own exchanges are not listed beside it, nor what completes a
    reduce-scatter.)"""
    computations, _ = _parse(hlo)
    found: dict[str, Exchange] = {}
    rings: set[str] = set()
    for instructions in computations.values():
        for each in instructions:
            ring = _RING.search(each.rest) if each.opcode == "while" else None
            if ring:
                within = _OPERATION.search(each.rest)
                rings.add(within[1] if within else "")
                found[each.name] = Exchange(_RINGS[ring[1]], 0, within[1] if within else each.name)
    for where, instructions in computations.items():
        for line in instructions:
            kind = _COLLECTIVE.fullmatch(f" {line.opcode}(")
            if kind is None:
                continue
            operation = _OPERATION.search(line.rest)
            name = operation[1] if operation else line.name
            # The TPU compiler writes a reduce-scatter as a sum and the part of it that is kept.
            called = "reduce-scatter" if where.startswith("all-reduce-scatter") else kind[1]
            if called == "all-to-all" and _is_summed(line, instructions):
                called = "reduce-scatter"
            if kind[1] == "collective-permute" and (
                _RING.search(where) or name in rings or _completes_scatter(line, instructions)
            ):
                continue
            channel = re.search(r"channel_id=(\d+)", line.rest)
            key = f"{called} {channel[1] if channel else line.name}"
            elements = 0 if line.result is None else math.prod(line.result.shape)
            before = found.get(key)
            if before is None or before.elements < elements:
                found[key] = Exchange(called, elements, name)
    return [*found.values()]


def _completes_scatter(permute: _Instruction, near: Sequence[_Instruction]) -> bool:
    """Whether an exchange is the end of a reduce-scatter: the TPU compiler pads rows to a multiple
    of what its kernel sends (1,024 rows over 4 chips to 4 x 264), and each chip then passes the few
    rows that are the next one's on to it."""
    named = {each.name: each for each in near}
    cut = named.get((_NAME.findall(permute.rest) or [""])[0])
    if cut is None or cut.opcode != "slice":
        return False
    scatter = named.get((_NAME.findall(cut.rest) or [""])[0])
    called = [] if scatter is None else _CALLED.findall(scatter.rest)
    return any(name.startswith("all-reduce-scatter") for name in called)


def _is_summed(exchange: _Instruction, near: Sequence[_Instruction]) -> bool:
    """Whether an all-to-all is how the TPU compiler writes a small reduce-scatter: each chip is
    sent its part of every sum, and adds them up."""
    return any(
        each.opcode == "reduce"
        and exchange.name in _NAME.findall(each.rest.split(")", 1)[0])
        and "to_apply=%all-to-all.reduce_sub_computation" in each.rest
        for each in near
    )


def own_kernels(hlo: str) -> list[float]:
    """Operations of the matrix products of each of the package's kernels that a module calls, by
    the kernel's own statement, less what it computes anew (`vit_flax.attention.tpu.NEEDED`)."""
    found = []
    for line in hlo.splitlines():
        name, stated = _OWN.search(line), _STATED.search(line)
        if name and stated and 'custom_call_target="tpu_custom_call"' in line:
            found.append(float(stated[1]) * NEEDED[name[1]])
    return found


def custom_kernels(hlo: str) -> int:
    """How many kernels written by hand (Pallas) an optimized module calls."""
    return hlo.count('custom_call_target="tpu_custom_call"')
