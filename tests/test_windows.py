"""Deformable attention by windows: what they cover, and that what they do not cover is sampled all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.models import windows
from magnet_jax.models.deformable import reference_points
from magnet_jax.models.sampling import sample

# Several windows each way; not a multiple of a cell, not all halves of each other, one smaller than a window.
LEVELS = ((5, 6), (9, 12), (19, 25), (38, 50))
PIXELS, HEADS, POINTS = sum(h * w for h, w in LEVELS), 4, 2
WIDTH, HEIGHT = (np.repeat([level[axis] for level in LEVELS], POINTS) for axis in (1, 0))
CENTRE = reference_points(LEVELS)[:, None]


def inputs(reach, seed=0):
    """Samples up to `reach` pixels away from their query, some on pixel centres."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-reach, reach, (2, 2, PIXELS, HEADS, len(LEVELS) * POINTS))
    x, y = x + CENTRE[..., :1] * WIDTH - 0.5, y + CENTRE[..., 1:] * HEIGHT - 0.5
    x[:, ::3], y[:, 1::3] = np.floor(x[:, ::3]), np.ceil(y[:, 1::3])
    if reach <= windows.REACH:
        x[:, ::3] += np.abs(x[:, ::3] - CENTRE[::3, :, :1] * WIDTH + 0.5) > windows.REACH
        y[:, 1::3] -= np.abs(y[:, 1::3] - CENTRE[1::3, :, 1:] * HEIGHT + 0.5) > windows.REACH
    value = rng.normal(size=(2, PIXELS, HEADS, 5))
    return [jnp.asarray(a, jnp.float32) for a in (value, x, y, rng.normal(size=x.shape))]


def value_and_gradients(form, arrays, dtype=jnp.float32):
    value, *rest = arrays

    @jax.jit
    def both(*arrays):
        result, pull = jax.vjp(lambda *a: sample(*a, LEVELS, form), *arrays)
        return result, pull(
            jnp.cos(jnp.arange(result.size, dtype=jnp.float32)).reshape(result.shape).astype(dtype)
        )

    return jax.tree.leaves(both(value.astype(dtype), *rest))


def test_every_query_is_in_one_cell():
    cells = windows._cells(LEVELS)
    assert cells.grid == (5, 5)
    assert sorted(cells.queries[cells.used]) == list(range(PIXELS))
    np.testing.assert_array_equal(cells.queries.ravel()[cells.places], np.arange(PIXELS))


def test_usual_pictures_fill_the_lanes():
    """480 pixels: 128 queries in every cell, and windows that are but a part of the large maps."""
    cells = windows._cells(((15, 15), (30, 30), (60, 60), (120, 120)))
    assert cells.grid == (15, 10)
    assert cells.queries.shape == (150, 128)
    assert cells.used.sum() == 19125
    lengths = [(rows.length, columns.length) for rows, columns in cells.axes]
    assert lengths == [(16, 16), (16, 17), (24, 20), (24, 26)]


@pytest.mark.parametrize("reach", [0.0, 4.0, float(windows.REACH)])
def test_what_is_near_is_covered(reach):
    arrays = inputs(reach)
    assert windows.covered(*arrays[1:3], LEVELS)
    # Outside the map there is nothing to see, however far.
    assert windows.covered(arrays[1].at[:, ::5].add(1e6), arrays[2].at[:, 1::5].add(-1e9), LEVELS)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bad", [30.0, -30.0, np.nan])
def test_one_sample_far_away_is_not_covered(axis, bad):
    """Of a query in a corner of the finest map, so that the sample is still in the map; and one that is no number."""
    arrays = inputs(0.0)
    query = PIXELS - LEVELS[-1][0] * LEVELS[-1][1] if bad > 0 else PIXELS - 1
    point = arrays[axis][1, query, 2, -1]
    arrays[axis] = arrays[axis].at[1, query, 2, -1].set(point + bad)
    assert not windows.covered(*arrays[1:3], LEVELS)


@pytest.mark.parametrize("axis", [0, 1])
def test_windows_end_where_they_say(axis):
    """A sample needs both of its neighbours, and a slope the right one even at a pixel's centre."""
    arrays, cells = inputs(0.0), windows._cells(LEVELS)
    query = (
        PIXELS - LEVELS[-1][0] * LEVELS[-1][1] // 2 + LEVELS[-1][1] // 2
    )  # In the middle of the finest map.
    cell = np.unravel_index(cells.places[query] // cells.queries.shape[1], cells.grid)[axis]
    rows = cells.axes[-1][axis]
    first, last = int(rows.first[cell]), int(rows.first[cell]) + rows.length - 1
    assert 0 < first < last < rows.size - 1
    places = [(first, True), (first - 0.01, False), (last - 0.01, True), (last, False), (last + 0.5, False)]
    for place, expected in places:
        moved = list(arrays)
        moved[2 - axis] = moved[2 - axis].at[0, query, 0, -1].set(place)
        assert bool(windows.covered(*moved[1:3], LEVELS)) is expected, place


def test_what_is_covered_is_exact():
    """Against gather; and each window ends where it says, so that a sample it does not cover would be lost."""
    for reach in (1.0, float(windows.REACH)):
        arrays = inputs(reach, seed=3)
        result = jax.jit(windows.forward, static_argnums=4)(*arrays, LEVELS)
        gather = value_and_gradients("gather", arrays)
        np.testing.assert_allclose(result, gather[0], atol=2e-5)
        gradient = jnp.cos(jnp.arange(result.size, dtype=jnp.float32)).reshape(result.shape)
        gradients = jax.jit(windows.backward, static_argnums=0)(LEVELS, tuple(arrays), gradient)
        for name, a, b in zip(("value", "x", "y", "weights"), gradients, gather[1:], strict=True):
            assert np.abs(b).max() > 1, name
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
    far = inputs(30.0)
    assert np.abs(windows.forward(*far, LEVELS) - value_and_gradients("gather", far)[0]).max() > 1


@pytest.mark.parametrize("reach", [1.0, 30.0])
def test_samples_anywhere_equal_gather(reach):
    """Within the windows, and where a few or most are outside, so that rows are read instead."""
    arrays = inputs(reach, seed=4)
    assert bool(windows.covered(*arrays[1:3], LEVELS)) == (reach == 1.0)
    for a, b in zip(
        value_and_gradients("windows", arrays), value_and_gradients("gather", arrays), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_is_as_near_as_rows():
    arrays = inputs(3.0, seed=5)
    exact = value_and_gradients("gather", arrays)
    for a, b, c in zip(
        exact,
        value_and_gradients("windows", arrays, jnp.bfloat16),
        value_and_gradients("rows", arrays, jnp.bfloat16),
        strict=True,
    ):
        far, near = (np.abs(np.asarray(x, np.float32) - a).mean() for x in (b, c))
        assert 0 < far < 2.5 * near + 1e-6


def test_queries_must_be_the_pixels():
    value, *rest = inputs(1.0)
    with pytest.raises(ValueError, match=f"a query for each of the {PIXELS} pixels; got 9"):
        sample(value, *(a[:, :9] for a in rest), LEVELS, "windows")
