"""Rows in another order and back, and the gradients of both."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from magnet_jax.models.layers import batch_split_by
from magnet_jax.models.order import Order, arrange, restore
from magnet_jax.sharding import make_mesh


@pytest.fixture
def order():
    """Five rows, of which the last means nothing, at seven places."""
    return Order.of(np.array([3, 0, 6, 1, -1]), 7)


def test_rows_are_where_the_order_says(order):
    array = np.arange(1.0, 31.0, dtype=np.float32).reshape(2, 5, 3)
    arranged = np.zeros((2, 7, 3), np.float32)
    arranged[:, [3, 0, 6, 1]] = array[:, :4]
    np.testing.assert_array_equal(arrange(array, order), arranged)
    known = array.copy()
    known[:, 4] = 0
    np.testing.assert_array_equal(restore(arranged, order), known)


@pytest.mark.parametrize("function", [arrange, restore])
def test_gradients_are_those_of_the_linear_map(order, function):
    random = np.random.default_rng(0)
    shape = (2, 5 if function is arrange else 7, 3)
    array, direction = random.normal(size=(2, *shape)).astype(np.float32)
    result, pull = jax.vjp(lambda a: function(a, order), array)
    gradient = random.normal(size=result.shape).astype(np.float32)
    (found,) = pull(gradient)
    expected = float(np.vdot(function(direction, order), gradient))
    assert float(np.vdot(found, direction)) == pytest.approx(expected, rel=1e-5)


def test_devices_keep_their_rows(order):
    """Nothing is sent for a change of order, forward or backward."""
    sharding = jax.NamedSharding(make_mesh((("data", -1),), jax.devices()[:2]), PartitionSpec("data"))
    array = jax.device_put(np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32), sharding)

    def there_and_back(array):
        with batch_split_by(sharding, len(array)):
            result, pull = jax.vjp(lambda a: restore(arrange(a, order), order), array)
            return result, pull(array)

    compiled = jax.jit(there_and_back).lower(array).compile()
    assert not any(
        name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute")
    )
    for found in jax.tree.leaves(compiled(array)):
        np.testing.assert_array_equal(found[:, :4], array[:, :4])
