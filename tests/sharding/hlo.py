"""What a compiled step sends: its collectives, how often each runs, and over which axes of the mesh."""

import collections
import dataclasses
import math
import re

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of them.

    Attributes:
        kind: what it does.
        nbytes: of its results.
        times: how often it runs in a step.
        axes: those of the mesh that it goes over.
        chips: how many take part.
        name: the operation of JAX's that it was made for.
    """

    kind: str
    nbytes: int
    times: int
    axes: tuple[str, ...]
    chips: int
    name: str

    @property
    def sent(self):
        """Bytes that each chip sends in a step, by rings; a permutation sends all."""
        part = (self.chips - 1) / self.chips
        share = {"all-reduce": 2 * part, "reduce-scatter": part * self.chips, "collective-permute": 1.0}
        return self.times * self.nbytes * share.get(self.kind, part)


def sent_by_axes(text, mesh):
    """The bytes that each chip sends in a step, by the axes that they go over."""
    found = collections.Counter()
    for one in collectives(text, mesh):
        found[one.axes] += one.sent
    return found


def by_kind(text):
    """The collectives of a compiled program as they are written: how many of each kind, and their results' bytes."""
    counts, sizes = collections.Counter(), collections.Counter()
    for shapes, kind in re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\(", text):
        counts[kind] += 1
        sizes[kind] += _nbytes(shapes)
    return counts, sizes


def collectives(text, mesh):
    """The collectives of a compiled step.

    Args:
        text: `lowered.compile().as_text()`.
        mesh: the mesh, whose devices are numbered in order.
    """
    computations, entry = _computations(text)
    times = collections.Counter()
    _count(computations, entry, 1, times)
    found = []
    for name, often in times.items():
        for line in computations[name]:
            match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
            if match:
                groups = _groups(line)
                axes = _axes(groups, mesh)
                of = re.search(r'op_name="([^"]*)"', line)
                chips = max(map(len, groups))
                found.append(Collective(match[2], _nbytes(match[1]), often, axes, chips, of[1] if of else ""))
    return found


def _computations(text):
    found, entry, lines = {}, None, []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return found, entry


def _count(computations, name, often, times):
    """How often each computation runs: the bodies of loops as often as the compiler knows them to."""
    times[name] += often
    for line in computations[name]:
        if " while(" in line:
            trips = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
            _count(computations, re.search(r"body=%([\w.\-]+)", line)[1], often * trips, times)
        else:
            for inner in re.findall(r"(?:calls|true_computation|false_computation)=%([\w.\-]+)", line):
                _count(computations, inner, often, times)


def _nbytes(shapes):
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * _BYTES[kind]
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def _groups(line):
    """The numbers of the devices that meet, for each group of them."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", line)
    if listed:
        return [[int(number) for number in group.split(",")] for group in listed[1].split("},{")]
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[3])]
        count = math.prod(sizes.values())
        numbers = (_numbers(named[2]) if named[2] else np.arange(count)).reshape(tuple(sizes.values()))
        rest = [axis for axis in range(len(sizes)) if axis not in over]
        chips = math.prod(numbers.shape[axis] for axis in over)
        return numbers.transpose(*rest, *over).reshape(-1, chips).tolist()
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?),? ", line)
    return _numbers(counted[3]).reshape(int(counted[1]), int(counted[2])).tolist()


def _numbers(text):
    """Numbers of devices in an order that is written as `[2,4]T(1,0)`: counted in one shape, and turned."""
    shape, turned = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(map(int, shape.split(",")))).reshape([int(size) for size in shape.split(",")])
    return numbers.transpose([int(axis) for axis in turned.split(",")]) if turned else numbers


def _axes(groups, mesh):
    shape = tuple(mesh.shape.values())
    varied = set()
    for group in groups:
        places = np.array(np.unravel_index(group, shape)).T
        varied |= {axis for axis in range(len(shape)) if len(set(places[:, axis])) > 1}
    return tuple(mesh.axis_names[axis] for axis in sorted(varied))
