"""What the tests on eight forced devices share: meshes, and how to lay arrays out."""

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
