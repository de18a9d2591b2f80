"""What a compiled program moves, read from its text: collectives, and bytes from and to memory.

XLA's own analysis counts the body of a loop once; here every instruction counts as often as it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=[\]})]) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")
# They name values, and move nothing.
_NAMING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
}


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it.

    Attributes
    ----------
    kind
        ``all-gather``, ``all-reduce``, ``reduce-scatter``, ``all-to-all`` or ``collective-permute``.
    size
        Bytes of the joined array: what is gathered, or what is reduced.
    group
        Devices of the first group that take part, by their place in the mesh.
    times
        How often it runs.
    """

    kind: str
    size: float
    group: tuple[int, ...]
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, over all times, by the algorithms that send least."""
        if self.kind == "collective-permute":
            return self.size * self.times
        share = (len(self.group) - 1) / len(self.group)
        return (2 if self.kind == "all-reduce" else 1) * share * self.size * self.times


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    result: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        depth = 1
        for place, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return _NAME.findall(self.rest[:place])
        return _NAME.findall(self.rest)

    @property
    def called(self) -> list[str]:
        applied = re.findall(r"to_apply=%?([\w.\-]+)", self.rest) if self.opcode == "call" else []
        branches = [name for names in _BRANCHES.findall(self.rest) for name in _NAME.findall(names)]
        return [*_CALLED.findall(self.rest), *branches, *applied]


class ProgramText:
    """The text of a compiled program, by computation.

    Parameters
    ----------
    text
        Of ``jax.stages.Compiled.as_text()``.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[_Instruction]] = {}
        self._entry, inside = "", ""
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                inside = start[2]
                self._computations[inside] = []
                if start[1]:
                    self._entry = inside
            elif (found := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(found[3])):
                result, rest = found[3][: opcode.start()], found[3][opcode.end() :]
                self._computations[inside].append(
                    _Instruction(found[2], opcode[1], result, rest, found[1] is not None)
                )

    def collectives(self) -> list[Collective]:
        """All collectives that run."""
        return [
            Collective(kind, _collected(kind, instruction), _first_group(instruction.rest), times)
            for name, instruction, times in self._running(self._entry, 1, inside_fusions=True)
            if (kind := _kind(name, instruction))
        ]

    def memory_traffic(self) -> float:
        """Bytes that instructions read from and write to the device's memory (not its caches)."""
        return sum(
            times * self._moved(name, instruction)
            for name, instruction, times in self._running(self._entry, 1, inside_fusions=False)
            if instruction.opcode not in _NAMING
        )

    def _running(
        self, computation: str, times: int, *, inside_fusions: bool
    ) -> Iterator[tuple[str, _Instruction, int]]:
        for instruction in self._computations[computation]:
            yield computation, instruction, times
            if instruction.opcode == "fusion" and not inside_fusions:
                continue
            repeats = self._trips(instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                yield from self._running(called, times * repeats, inside_fusions=inside_fusions)

    def _trips(self, loop: _Instruction) -> int:
        """How often a loop runs: as XLA says, or as its condition counts from 0."""
        if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        assert condition is not None
        counts = {
            int(number[1])
            for instruction in self._computations[condition[1]]
            if instruction.opcode == "constant" and (number := re.match(r"(\d+)\)", instruction.rest))
        }
        if len(counts) != 1:
            raise ValueError(f"cannot tell how often {loop.name} runs: its condition compares with {counts}")
        return counts.pop()

    def _moved(self, computation: str, instruction: _Instruction) -> float:
        operands = [self._types(computation).get(name, "") for name in instruction.operands]
        if instruction.opcode in ("dynamic-slice", "gather"):
            return 2 * _in_memory(instruction.result)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(map(_in_memory, operands[1:]))
        if instruction.opcode == "copy-start":  # a tuple of the copy, the original and a token
            return sum(_in_memory(array) for array in re.split(r", (?=[a-z])", instruction.result)[:2])
        if instruction.opcode.endswith("-done"):
            return 0.0
        if instruction.opcode != "fusion":
            return _in_memory(instruction.result) + sum(map(_in_memory, operands))
        (inside,) = instruction.called
        read = sum(
            self._read(inside, name, of_parameter=place)
            for place, name in enumerate(operands)
            if _in_memory(name)
        )
        arrays = _arrays(instruction.result)
        written = zip(arrays, self._written(inside), strict=True)
        return read + sum(size for array, size in written if _in_memory(array))

    def _types(self, computation: str) -> dict[str, str]:
        return {instruction.name: instruction.result for instruction in self._computations[computation]}

    def _read(self, computation: str, result: str, *, name: str = "", of_parameter: int = -1) -> float:
        """Bytes that a fusion reads of a value in it, of type `result`: slices of it, or all."""
        if not name:
            name = next(
                instruction.name
                for instruction in self._computations[computation]
                if instruction.opcode == "parameter" and int(instruction.rest.split(")")[0]) == of_parameter
            )
        read = 0.0
        for use in self._computations[computation]:
            if name not in (operands := use.operands):
                continue
            if use.opcode == "dynamic-slice" and operands[0] == name:
                read += _bytes(use.result)
            elif use.opcode == "dynamic-update-slice" and operands[0] == name:
                continue  # written in place
            elif use.opcode == "bitcast":
                read += self._read(computation, result, name=use.name)
            elif use.opcode == "fusion":
                read += sum(
                    self._read(use.called[0], result, of_parameter=place)
                    for place, operand in enumerate(operands)
                    if operand == name
                )
            else:
                return _bytes(result)
        return min(read, _bytes(result))

    def _written(self, computation: str) -> list[float]:
        """Bytes of each array that a fusion writes: all, or what it puts into one that is there."""
        by_name = {instruction.name: instruction for instruction in self._computations[computation]}
        root = next(instruction for instruction in by_name.values() if instruction.is_root)
        if root.opcode == "tuple":
            return [self._written_by(by_name[name], by_name) for name in root.operands]
        arrays = _arrays(root.result)
        return [self._written_by(root, by_name)] if len(arrays) == 1 else [_bytes(array) for array in arrays]

    def _written_by(self, instruction: _Instruction, by_name: dict[str, _Instruction]) -> float:
        if instruction.opcode == "dynamic-update-slice":
            return _bytes(by_name[instruction.operands[1]].result)
        if instruction.opcode == "bitcast":
            return self._written_by(by_name[instruction.operands[0]], by_name)
        if instruction.opcode == "fusion":
            return sum(self._written(instruction.called[0]))
        return _bytes(instruction.result)


def _kind(computation: str, instruction: _Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return None
    # TPUs have them as an all-reduce and a slice in one fusion.
    return "reduce-scatter" if "all-reduce-scatter" in computation else kind


def _collected(kind: str, instruction: _Instruction) -> float:
    """Bytes of the joined array."""
    arrays = list(map(_bytes, _arrays(instruction.result)))
    if instruction.opcode.endswith("-start") and kind == "all-gather":  # (operands, results)
        return sum(arrays[len(arrays) // 2 :])
    if instruction.opcode == "reduce-scatter":
        return sum(arrays) * len(_first_group(instruction.rest))
    if instruction.opcode == "collective-permute-start":  # (operand, result, contexts)
        return arrays[0]
    return sum(arrays)


def _arrays(text: str) -> list[str]:
    """The types of a tuple's arrays, or of one."""
    return [match.group() for match in _ARRAY.finditer(text)]


def _bytes(text: str) -> float:
    return sum(_width(match[1]) * _size(match[2]) for match in _ARRAY.finditer(text))


def _in_memory(text: str) -> float:
    """Bytes of the arrays of a type that lie in memory; for a cache, the layout has a number."""
    return sum(
        _width(match[1]) * _size(match[2])
        for match in _ARRAY.finditer(text)
        if not re.search(r"S\([1-9]", match[3] or "")
    )


def _size(dimensions: str) -> int:
    return prod(int(size) for size in dimensions.split(",") if size)


def _width(dtype: str) -> float:
    if dtype == "pred":
        return 1.0
    bits = re.search(r"\d+", dtype)
    assert bits is not None
    return int(bits[0]) / 8


def _first_group(text: str) -> tuple[int, ...]:
    """The first of the groups of devices, of the four ways that XLA has to write them."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(device) for device in listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, size = int(tiled[1]), int(tiled[2])
        devices = _transposed(tiled[3], tiled[4])
        return tuple(int(device) for device in devices.reshape(groups, size)[0])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        text,
    )
    if not named:
        raise ValueError(f"cannot read the groups of {text[:200]!r}")
    axes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    sizes = list(axes.values())
    devices = _transposed(named[2] or str(prod(sizes)), named[3]).reshape(sizes)
    together = []
    for axis, part in re.findall(r"'([^']+)'(:\(\d+\)\d+)?", named[4]):
        if part:
            raise ValueError(f"cannot read parts of mesh axes: {named[4]}")
        together.append(list(axes).index(axis))
    first = tuple(slice(None) if place in together else 0 for place in range(len(sizes)))
    return tuple(int(device) for device in devices[first].ravel())


def _transposed(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(size) for size in sizes.split(",")]
    devices = np.arange(prod(shape)).reshape(shape)
    return devices if not order else devices.transpose([int(axis) for axis in order.split(",")])
