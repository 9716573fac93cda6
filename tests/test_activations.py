"""ReLU and GELU are those of JAX, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.models.activations import gelu, gelu_by_slope, relu


def test_relu_is_that_of_jax():
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, -jnp.inf, jnp.nan])
    found, expected = (jax.vjp(f, x) for f in (relu, jax.nn.relu))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1](x + 7), expected[1](x + 7))


@pytest.mark.parametrize("form", [gelu, gelu_by_slope])
def test_gelu_is_that_of_jax(form):
    x = jnp.linspace(-9, 9, 2001)
    found, expected = (jax.vjp(f, x) for f in (form, lambda x: jax.nn.gelu(x, approximate=False)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1](x + 7)[0], expected[1](x + 7)[0], rtol=1e-5, atol=1e-5)
    # bfloat16 has eight bits: x and 1 + erf are wrong by 1/512 each, of which x makes up to 9/512 where erf is near -1.
    np.testing.assert_allclose(form(x.astype(jnp.bfloat16)), expected[0], rtol=1 / 64, atol=1 / 64)
