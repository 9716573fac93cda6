"""Layers of one kind as a loop: the same values and gradients, of a shorter program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from magnet_jax.errors import UserError
from magnet_jax.models.alignment import ImageAlignment
from magnet_jax.models.layers import Remat
from magnet_jax.models.loop import loop
from magnet_jax.models.mask_predictor import MaskPredictor
from magnet_jax.models.pixel_decoder import PixelDecoder
from magnet_jax.network import build_model

RNG = np.random.default_rng(0)


def normal(*shape):
    return np.asarray(RNG.normal(size=shape), np.float32)


WORDS, WORD_MASK = normal(2, 5, 8), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
MAPS = [normal(2, size, size, 8) for size in (1, 2, 4, 8)]  # coarse to fine
# A pyramid has a quarter of its channels: of two, normalised, little but signs would be left.
WIDE_MAP = normal(2, 8, 8, 32)


def image_alignment(**fields):
    module = ImageAlignment(pyramids=(1, 2, 3), heads=2, **fields)

    def run(module, x, words, train):  # So many numbers have gradients of up to 80 in their sum.
        return [y / 32 for y in module(x, words, WORD_MASK, train=train)]

    return module, run, (WIDE_MAP, WORDS)


def pixel_decoder(**fields):
    module = PixelDecoder(8, 2, 2, 2, 16, groups=2, sampling="points", **fields)
    return module, lambda module, *maps, train: module(maps), MAPS[::-1]


def predictor(**fields):
    module = MaskPredictor(layers=5, heads=2, feedforward=16, **fields)

    def run(module, *maps, train):
        return module(maps[:2], maps[2])

    return module, run, MAPS[1:]


CASES = {
    "image alignment": (image_alignment, {}),
    "pixel decoder": (pixel_decoder, {}),
    "pixel decoder, remat": (pixel_decoder, {"remat": Remat(("decoder",))}),
    "predictor": (predictor, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_changes_nothing(case, monkeypatch):
    """Neither values nor gradients, nor the parameters and their names."""
    for module in ("alignment", "pixel_decoder", "mask_predictor"):  # Smaller networks are compiled sooner.
        monkeypatch.setattr(f"magnet_jax.models.{module}.LEAST", 2)
    make, fields = CASES[case]
    found, programs = [], []
    for scan in (False, True):
        module, run, inputs = make(scan=scan, **fields)

        def init(key, *inputs, module=module, run=run):
            return module.init(key, *inputs, train=False, method=run)

        shapes = jax.eval_shape(init, jax.random.key(0), *inputs)

        def objective(params, *inputs, module=module, run=run):
            out = module.apply(params, *inputs, train=True, method=run)
            leaves = jax.tree.leaves(out)
            return sum(jnp.sin(leaf).sum() for leaf in leaves), leaves

        rng = np.random.default_rng(6)
        params = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        arguments = tuple(range(1 + len(inputs)))
        function = jax.value_and_grad(objective, arguments, has_aux=True)
        programs.append(str(jax.make_jaxpr(function)(params, *inputs)).count("dot_general"))
        # Little is computed; most of the time would go into optimising it.
        compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
        found.append((shapes, compiled(params, *inputs)))
    assert programs[1] < programs[0]
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    assert jax.tree.leaves(found[0][0]) == jax.tree.leaves(found[1][0])

    def same(a, b):
        # By the tensor's largest value, as in parity.py: gradients of keys' biases are zero but for rounding.
        assert np.abs(a - b).max() <= 2e-5 * max(np.abs(b).max(), 0.1)

    jax.tree.map(same, found[0][1], found[1][1])


def test_a_loop_takes_its_rounds_in_turn():
    """Each with its own parameters."""
    shapes = {"a": (3,), "b": (2, 2), "c": ()}
    rounds = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(4)]

    def step(carry, params, y):
        assert {name: leaf.shape for name, leaf in params.items()} == shapes
        return carry * y + params["c"], params

    carry, outputs = loop(step, 1.0, rounds, jnp.arange(4.0))
    c = [float(params["c"]) for params in rounds]
    np.testing.assert_allclose(carry, ((c[0] + c[1]) * 2 + c[2]) * 3 + c[3], rtol=1e-6)
    for name in shapes:
        np.testing.assert_array_equal(outputs[name], [params[name] for params in rounds])


def test_the_platform_chooses_loops():
    config = debug.get_config().model
    config.bert.vocab_size = 10

    def chosen(platform):
        return build_model(config, platform).scan

    assert [chosen(platform) for platform in ("cpu", "tpu", "gpu")] == [True, False, False]
    for layers in ("scan", "unroll"):
        config.layers = layers
        assert {chosen(platform) for platform in ("cpu", "tpu")} == {layers == "scan"}
    config.layers = "loop"
    with pytest.raises(UserError, match="config.model.layers is 'loop'; expected 'auto', 'scan' or 'unroll'"):
        build_model(config)
