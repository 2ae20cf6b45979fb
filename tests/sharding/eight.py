"""What the tests on eight forced devices share: meshes, how to lay arrays out, and the collectives of a program."""

import collections
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MANY = len(jax.devices()) >= 8

needs_devices = pytest.mark.skipif(not MANY, reason="takes eight devices; test_the_folder_on_eight_devices runs it")

MESHES = {
    "data_parallel": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor_parallel": {"tensor": 2},
    "combined": {"data": 2, "fsdp": 2, "tensor": 2},
    "sequence_parallel": {"data": 2, "fsdp": 2, "tensor": 2},
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(sizes, axes="auto"):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(KINDS[axes],) * len(sizes), devices=jax.devices()[:count]
    )


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s8": 1, "u8": 1, "u64": 8}


def collectives(text):
    """The collectives of a compiled program: how many of each kind, and the bytes that each kind brings about."""
    counts, sizes = collections.Counter(), collections.Counter()
    for shapes, kind in re.findall(
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    ):
        counts[kind] += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            sizes[kind] += _BYTES[dtype] * int(np.prod([int(size) for size in shape.split(",") if size]))
    return counts, sizes
