"""Deformable attention by windows: its cells, what windows hold, and that what they miss is sampled all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from magnet_jax.models import window_kernels, windows
from magnet_jax.models.layers import batch_split_by
from magnet_jax.models.order import arrange, restore, take_rows
from magnet_jax.models.pixel_decoder import PixelDecoder
from magnet_jax.models.sampling import cells_for, pixel_centres, sample
from magnet_jax.sharding import make_mesh

# Several windows each way; not multiples of a cell or of each other, one smaller than a window.
LEVELS = ((9, 12), (19, 25), (38, 50))
PIXELS, HEADS, POINTS = sum(h * w for h, w in LEVELS), 4, 2
CENTRES = np.asarray(pixel_centres(LEVELS, POINTS))
USUAL = ((15, 15), (30, 30), (60, 60), (120, 120))  # Of a picture of 480 pixels.


def inputs(reach, seed=0, channels=3):
    """Samples up to `reach` pixels away from their query, some on pixel centres."""
    rng = np.random.default_rng(seed)
    found = []
    for centre in CENTRES:
        at = centre + rng.uniform(-reach, reach, (2, PIXELS, HEADS, len(LEVELS) * POINTS))
        at[:, ::3] = np.round(at[:, ::3])
        at[:, ::3] -= np.sign(at[:, ::3] - centre[::3]) * (np.abs(at[:, ::3] - centre[::3]) > reach)
        found.append(at)
    value = rng.normal(size=(2, PIXELS, HEADS, channels))
    return [jnp.asarray(a, jnp.float32) for a in (value, *found, rng.normal(size=found[0].shape))]


@pytest.fixture(scope="module")
def cells():
    return cells_for(LEVELS, HEADS, 3)


@pytest.fixture(scope="module")
def by_kernel(cells):
    """The forward kernel alone: sums in cells, and whether windows missed something."""

    @jax.jit
    def run(value, x, y, weights):
        raw = jnp.concatenate([a.reshape(2, PIXELS, -1) for a in (x, y, weights)], -1)
        maps = take_rows(arrange(value.reshape(2, PIXELS, -1), cells.order), cells.pixels)
        out, missed = window_kernels.forward(maps, arrange(raw, cells.order), cells, HEADS, False)
        return restore(out, cells.order).reshape(value.shape), missed

    return run


@pytest.fixture(scope="module")
def value_and_gradients():
    """Compiled once for each form and dtype: `form, arrays -> [sums, gradients by value, x, y and weights]`."""

    def run(form, arrays, dtype=jnp.float32):
        def both(*arrays):
            result, pull = jax.vjp(lambda *a: sample(*a, LEVELS, form), *arrays)
            gradient = jnp.cos(jnp.arange(result.size, dtype=jnp.float32)).reshape(result.shape)
            return result, pull(gradient.astype(dtype))

        if (form, dtype) not in compiled:
            compiled[form, dtype] = jax.jit(both)
        value, *rest = arrays
        return jax.tree.leaves(compiled[form, dtype](value.astype(dtype), *rest))

    compiled = {}
    return run


@pytest.mark.parametrize(
    "levels", [LEVELS, USUAL, ((14, 14), (28, 28), (56, 56), (112, 112)), ((30, 40), (60, 80))]
)
def test_every_query_is_in_one_cell(levels):
    cells, pixels = windows.cells_of(levels, 32), sum(h * w for h, w in levels)
    assert sorted(cells.order.rows[cells.order.used]) == list(range(pixels))
    np.testing.assert_array_equal(cells.order.rows[cells.order.places], np.arange(pixels))


def test_usual_pictures_fill_the_lanes():
    """480 pixels: 600 cells of 32 queries for four heads of 32 channels, whose windows are but a part of the large maps."""
    cells = cells_for(USUAL, 8, 32)
    assert (cells.strips, cells.blocks, cells.lanes) == (30, 20, 32)
    assert (len(cells.order.rows), cells.order.used.sum()) == (19200, 19125)
    assert [rows.length for rows in cells.rows] == [13, 14, 15, 18]
    assert [columns.length for columns in cells.columns] == [16, 16, 16, 16]


def test_padded_maps_have_the_pixels_row_by_row(cells):
    index = np.arange(PIXELS, dtype=np.int32)[None, :, None]
    maps = np.asarray(take_rows(arrange(index, cells.order), cells.pixels))[0, :, 0]
    first = 0
    for (height, width), rows, columns, start in zip(
        LEVELS, cells.rows, cells.columns, cells.starts[:-1], strict=True
    ):
        level = maps[start : start + rows.padded * columns.padded].reshape(rows.padded, columns.padded)
        np.testing.assert_array_equal(
            level[:height, :width].ravel(), np.arange(first, first + height * width)
        )
        first += height * width
    np.testing.assert_array_equal(maps[cells.in_maps[cells.order.places]], np.arange(PIXELS))


@pytest.mark.parametrize("reach", [0.0, 4.0, float(windows.REACH)])
def test_what_is_near_is_not_missed(by_kernel, reach):
    value, x, y, weights = inputs(reach)
    assert not by_kernel(value, x, y, weights)[1]
    # Outside the map there is nothing to see, however far.
    assert not by_kernel(value, x.at[:, ::5].add(1e6), y.at[:, 1::5].add(-1e9), weights)[1]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bad", [30.0, -30.0, np.nan])
def test_one_sample_far_away_is_missed(by_kernel, axis, bad):
    """Of a query in a corner of the finest map, so that the sample is still in the map; and one that is no number."""
    arrays = inputs(0.0)
    query = PIXELS - LEVELS[-1][0] * LEVELS[-1][1] if bad > 0 else PIXELS - 1
    arrays[axis] = arrays[axis].at[1, query, 2, -1].add(bad)
    assert by_kernel(*arrays)[1]


@pytest.mark.parametrize("axis", [0, 1])
def test_windows_end_where_they_say(by_kernel, cells, axis):
    """A sample needs both of its neighbours, and a slope the right one even at a pixel's centre."""
    arrays = inputs(0.0)
    query = (
        PIXELS - LEVELS[-1][0] * LEVELS[-1][1] // 2 + LEVELS[-1][1] // 2
    )  # In the middle of the finest map.
    cell = cells.order.places[query] // cells.lanes
    level, number = (
        (cells.columns[-1], cell // cells.blocks) if axis else (cells.rows[-1], cell % cells.blocks)
    )
    first = int(level.first[number])
    last = first + level.length - 1
    assert 0 < first < last < level.size - 1
    places = [(first, False), (first - 0.25, True), (last - 0.25, False), (last, True), (last + 0.5, True)]
    for place, expected in places:
        moved = list(arrays)
        moved[2 - axis] = moved[2 - axis].at[0, query, 0, -1].set(place)
        assert bool(by_kernel(*moved)[1]) is expected, place


@pytest.mark.parametrize("reach", [1.0, float(windows.REACH)])
def test_what_is_not_missed_is_exact(by_kernel, value_and_gradients, reach):
    arrays = inputs(reach, seed=3)
    result, missed = by_kernel(*arrays)
    gather, windowed = (value_and_gradients(form, arrays) for form in ("gather", "windows"))
    assert not missed
    np.testing.assert_allclose(result, gather[0], atol=2e-5)
    for name, a, b in zip(("sums", "value", "x", "y", "weights"), windowed, gather, strict=True):
        assert np.abs(b).max() > 1, name
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)


def test_samples_anywhere_equal_gather(by_kernel, value_and_gradients):
    """Where a few or most are outside the windows, the kernel would be wrong, so that rows are read instead."""
    arrays = inputs(30.0, seed=4)
    gather = value_and_gradients("gather", arrays)
    result, missed = by_kernel(*arrays)
    assert missed
    assert np.abs(result - gather[0]).max() > 1
    for a, b in zip(value_and_gradients("windows", arrays), gather, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_is_as_near_as_rows(value_and_gradients):
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


@pytest.fixture(scope="module")
def decoder():
    """`(form, devices) -> outputs and gradients` of a pixel decoder with weights that are not the initial ones."""
    shapes = ((20, 28, 6), (10, 14, 8))
    fields = {"channels": 8, "layers": 2, "heads": 2, "points": 2, "feedforward": 8, "groups": 2}
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(2, *shape)).astype(np.float32) for shape in shapes]
    variables = jax.eval_shape(lambda *f: PixelDecoder(**fields).init(jax.random.key(0), f), *features)
    variables = jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), variables)

    def run(devices, **form):
        module = PixelDecoder(**fields, **form)
        sharding = jax.NamedSharding(
            make_mesh((("data", -1),), jax.devices()[:devices]), PartitionSpec("data")
        )

        def outputs(variables, features):
            with batch_split_by(sharding, 2):
                mask_features, refined = module.apply(variables, features)
            return [mask_features, *refined]

        @jax.jit
        def both(variables, features):
            found, pull = jax.vjp(outputs, variables, features)
            return found, pull(jax.tree.map(jnp.cos, found))

        return both(variables, jax.device_put(features, sharding))

    return run


@pytest.mark.parametrize("devices", [1, 2])
def test_a_decoder_in_cells_equals_one_in_the_order_of_pixels(decoder, devices):
    expected = jax.tree_util.tree_leaves_with_path(decoder(1, sampling="gather"))
    found = jax.tree_util.tree_leaves_with_path(decoder(devices, sampling="windows"))
    for (path, a), (_, b) in zip(expected, found, strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1, np.abs(a).max()), err_msg=name)


def test_platforms_choose_their_form():
    shapes = ((15, 15), (30, 30), (60, 60), (120, 120))

    def form(platform, shapes=shapes, channels=256, **fields):
        return PixelDecoder(platform=platform, channels=channels, heads=8, **fields).form(shapes)

    assert form("tpu") == "windows"
    assert form("tpu", shapes[:2]) == "dense"  # Few pixels,
    assert form("tpu", channels=240) == "rows"  # or heads that do not fit.
    assert (form("cpu"), form("gpu"), form("")) == ("points", "rows", "auto")
    assert form("tpu", sampling="rows") == "rows"


def test_queries_must_be_the_pixels():
    value, *rest = inputs(1.0)
    with pytest.raises(ValueError, match=f"a query for each of the {PIXELS} pixels; got 9"):
        sample(value, *(a[:, :9] for a in rest), LEVELS, "windows")


def test_levels_must_be_halves():
    levels = ((40, 40), (41, 41))
    assert windows.cells_of(levels, 32) is None
    value, x = np.zeros((1, 3281, 4, 3)), np.zeros((1, 3281, 4, 2))
    with pytest.raises(ValueError, match="levels that are about halves of each other"):
        sample(value, x, x, x, levels, "windows")
