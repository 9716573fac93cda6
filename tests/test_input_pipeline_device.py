"""Host batches to device arrays: the same numbers, laid out as asked, in order."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from input_pipeline.device import prefetch_to_device, to_device


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def batches(n):
    rows = 2 * jax.device_count()
    return [{"image": np.full((rows, 3), i, np.float32), "index": np.arange(rows) + i} for i in range(n)]


def test_values_and_layout(sharding):
    (batch,) = batches(1)
    arrays = to_device(batch, sharding, 2 * jax.device_count())
    assert arrays.keys() == batch.keys()
    for name, array in arrays.items():
        assert array.sharding == sharding
        assert np.array_equal(array, batch[name])


@pytest.mark.parametrize("size", [0, 1, 2, 10])
def test_prefetch_keeps_order_and_count(sharding, size):
    found = [
        int(batch["image"][0, 0])
        for batch in prefetch_to_device(batches(5), sharding, 2 * jax.device_count(), size)
    ]
    assert found == list(range(5))


def test_prefetch_reads_no_further_than_asked(sharding):
    read = []

    def stream():
        for i, batch in enumerate(batches(9)):
            read.append(i)
            yield batch

    next(prefetch_to_device(stream(), sharding, 2 * jax.device_count(), size=2))
    assert read == [0, 1, 2]
