"""Rows in another order and back, and the gradients of both."""

import jax
import numpy as np
import pytest

from magnet_jax.models.order import Order, arrange, restore


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
