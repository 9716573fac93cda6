"""What each parameter of a new network is drawn from, by its name (spec sections 2b, 4b and 5)."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import Scope

from configs import debug
from magnet_jax.models.deformable import fan_bias
from magnet_jax.models.layers import REMAT_PARTS, Dense, fan_in_dense
from magnet_jax.models.parameters import (
    init_with_output,
    parameter,
    truncated_normal,
    unit_normal,
)
from magnet_jax.models.parameters import (
    normal as bert_normal,
)
from magnet_jax.network import build_network
from magnet_jax.programs import _inner_jaxprs
from magnet_jax.sharding import path_name
from magnet_jax.trained import batch_shapes


def constant(value):
    return lambda x: x - value


def normal(deviation):
    return lambda x: x / deviation


def uniform(bound):
    """`bound` of (values that go in, values that come out)."""
    return lambda x: x / bound(np.prod(x.shape[:-1]), x.shape[-1])


fan_in = uniform(lambda ins, outs: ins**-0.5)
xavier = uniform(lambda ins, outs: (6 / (ins + outs)) ** 0.5)
kaiming = uniform(lambda ins, outs: (3 / ins) ** 0.5)

# Of these, the first whose expression is found in a name; biases of linear layers with uniform fan-in have one as well.
RULES = [
    (r"/scale$", "constant", constant(1)),
    (r"norm[^/]*/bias$", "constant", constant(0)),
    (r"attn/offsets/bias$", "fan", None),
    (r"attn/(offsets|weights)/", "constant", constant(0)),
    (r"gate_\d/fc1/kernel$", "normal", normal(0.02)),
    (r"gate_\d/fc2/kernel$", "constant", constant(0)),
    (r"predictor/(mask_\d|class)/kernel$", "uniform", fan_in),
    (r"predictor/(query|query_position|level_embedding)$|decoder/level_embedding$", "normal", normal(1)),
    (r"predictor/.*/kernel$", "uniform", xavier),
    (r"decoder/mask_features/kernel$", "uniform", kaiming),
    (r"decoder/.*/kernel$", "uniform", xavier),
    (r"^(model/text|grounding)/.*/(kernel|embedding)$", "normal", normal(0.02)),
    (r"text_fusion_\d/.*kernel$|lang_proj/kernel$", "uniform", fan_in),
    (r"pyramid_\d/fc\d/kernel$|pwam/(key|value|visual|mixed)/kernel$", "uniform", fan_in),
    (r"pyramid_\d/pwam/.*/kernel$|image_fusion_\d/.*/kernel$", "truncated", normal(0.02)),
    (r"^model/image/.*(kernel|relative_position_bias)$", "truncated", normal(0.02)),
    (
        r"(predictor/(mask_\d|class)|text_fusion_\d/\w+|lang_proj|pwam/(key|value|visual|mixed))/bias$",
        "bias",
        None,
    ),
    (r"bias$", "constant", constant(0)),
]
# Largest absolute value and deviation of numbers whose unit is the distribution's own; normal ones are cut at two.
EXPECTED = {"normal": (6, 1), "truncated": (2, 0.8796), "uniform": (1, 3**-0.5), "bias": (1, 3**-0.5)}


def small_config():
    config = debug.get_config()
    config.model.bert.vocab_size, config.loss.mask_id = 40, 4
    return config


def flax_init_with_output(module, key, *arguments):
    """What `init_with_output` is compared with."""
    return module.init_with_output(key, *arguments)


@pytest.fixture
def values(monkeypatch):
    """Of every parameter by name, drawn one by one: a program that draws all takes a minute to compile."""
    config = small_config()
    network, recorded, param = build_network(config), {}, Scope.param

    def record(self, name, initializer, *arguments, **options):
        value = param(self, name, initializer, *arguments, **options)
        recorded.setdefault("/".join((*self.path, name)), (initializer, arguments, value.shape))
        return value

    monkeypatch.setattr(Scope, "param", record)
    monkeypatch.setattr("magnet_jax.network.init_with_output", flax_init_with_output)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch_shapes(config)))["params"]
    names = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    assert len(recorded) == len(names)
    values = {}
    for number, (name, shape) in enumerate(names.items()):
        initializer, arguments, recorded_shape = recorded[name.split("/", 1)[1]]
        assert recorded_shape == shape
        values[name] = np.asarray(initializer(jax.random.key(number), *arguments))
    return values


def test_every_parameter_starts_as_it_should(values):
    drawn, used = {}, set()
    for name, x in values.items():
        number, (_, kind, unit) = next(
            (number, rule) for number, rule in enumerate(RULES) if re.search(rule[0], name)
        )
        used.add(number)
        if kind == "fan":
            np.testing.assert_array_equal(x, fan_bias(2, 4, 2).ravel(), err_msg=name)
        elif kind == "constant":
            np.testing.assert_array_equal(unit(x), 0, err_msg=name)
        elif kind == "bias":  # Uniform as the kernel is.
            ins = len(values[name.removesuffix("bias") + "kernel"])
            drawn.setdefault(number, []).append(x * ins**0.5)
        else:
            drawn.setdefault(number, []).append(unit(x))
    assert used == set(range(len(RULES)))
    for number, arrays in drawn.items():
        pattern, kind, _ = RULES[number]
        x = np.concatenate([array.ravel() for array in arrays])
        largest, deviation = EXPECTED[kind]
        assert len(x) > 100 or kind == "normal", pattern
        error = 5 * deviation / np.sqrt(len(x))
        assert abs(x.mean()) < error, pattern
        assert abs(x.std() - deviation) < error, pattern
        assert np.abs(x).max() <= largest * (1 + 1e-6), pattern
        if kind == "truncated":
            assert np.abs(x).max() > 1.8, pattern


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = fan_in_dense(6, 6, dtype=jnp.float32, name="fan")(x)
        return x + parameter(self, "place", unit_normal, (1, 6)) + nn.Dense(6, name="foreign")(x)


class Outer(nn.Module):
    """With parameters of one kind in several places, foreign ones, and such as transformations of flax make keys for."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(5, 6, embedding_init=bert_normal, name="words")(ids)
        for i in range(3):
            x = Inner(name=f"inner_{i}")(x)
        x = nn.remat(Inner)(name="again")(x)
        several = nn.vmap(Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        x = several(6, name="several")(jnp.stack([x, x])).sum(0)
        return Dense(6, kernel_init=truncated_normal, name="last")(x)


def test_values_are_those_that_flax_would_draw_one_by_one():
    ids = jnp.zeros((1, 3), jnp.int32)
    output, variables = jax.jit(lambda key: init_with_output(Outer(), key, ids))(jax.random.key(3))
    one_by_one = jax.jit(Outer().init)(jax.random.key(3), ids)
    assert output.shape == (1, 3, 6)
    assert jax.tree.structure(variables) == jax.tree.structure(one_by_one)
    # Within another program, values may be rounded differently.
    jax.tree.map(lambda *x: np.testing.assert_allclose(*x, rtol=3e-7), variables, one_by_one)


def count_draws(jaxpr):
    return sum(
        (equation.primitive.name == "random_bits") + sum(map(count_draws, _inner_jaxprs(equation.params)))
        for equation in jaxpr.eqns
    )


def test_values_of_one_kind_are_drawn_together(monkeypatch):
    config = small_config()
    network, batch = build_network(config), batch_shapes(config)

    def draws():
        return count_draws(jax.make_jaxpr(lambda key: network.init(key, batch))(jax.random.key(0)).jaxpr)

    together = draws()
    monkeypatch.setattr("magnet_jax.network.init_with_output", flax_init_with_output)
    one_by_one = draws()
    assert one_by_one > 150
    assert together < one_by_one / 2


def test_remat_changes_no_program():
    config = small_config()
    batch = batch_shapes(config)
    plain = build_network(config)
    config.model.remat = REMAT_PARTS
    programs = [
        str(jax.make_jaxpr(lambda key, network=network: network.init(key, batch))(jax.random.key(0)))
        for network in (plain, build_network(config))
    ]
    assert programs[0] == programs[1]
