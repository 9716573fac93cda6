"""Fusion of pixels and words: masks of words, gates, pooling and resizing, which reference outputs hardly see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from magnet_jax.models import alignment
from magnet_jax.models.activations import gelu, relu
from magnet_jax.models.alignment import Gate, ImageAlignment, LanguageAlignment, PixelWordAttention
from magnet_jax.models.layers import Dense
from magnet_jax.models.norms import instance_norm
from magnet_jax.network import build_model


def random_params(rng, module, *inputs, scale=1.0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda s: (scale * rng.normal(size=s.shape)).astype(np.float32), shapes)


def linear(x, params):
    return x @ params["kernel"] + params["bias"]


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.fixture
def fusion_inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 8)).astype(np.float32)
    words = rng.normal(size=(2, 5, 12)).astype(np.float32)
    word_mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    return rng, x, words, word_mask


# --- PWAM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_pwam_written_out(fusion_inputs, heads, norm):
    """Also: the scale is that of the full width, whatever the heads."""
    rng, x, words, word_mask = fusion_inputs
    module = PixelWordAttention(heads, norm)
    params = random_params(rng, module, x, words, word_mask)
    p = params["params"]

    def normalise(y, name):
        return layer_norm(y, p[name]) if norm == "layer" else np.asarray(instance_norm(jnp.asarray(y)))

    m = word_mask[..., None]
    query = normalise(linear(x, p["query"]), "query_norm")
    key, value = linear(words, p["key"]) * m, linear(words, p["value"]) * m
    language, width = np.zeros_like(x), 8 // heads
    for b in range(2):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            logits = query[b, :, part] @ key[b, :, part].T * 8**-0.5 + (1e4 * word_mask[b] - 1e4)
            language[b, :, part] = softmax(logits) @ value[b, :, part]
    language = normalise(linear(language, p["output"]), "output_norm")
    expected = gelu(linear(np.asarray(gelu(linear(x, p["visual"]))) * language, p["mixed"]))
    np.testing.assert_allclose(module.apply(params, x, words, word_mask), expected, atol=1e-4)


def test_pwam_keys_are_masked(fusion_inputs):
    """Padding so large that its logits would outweigh the additive mask has no influence, since keys are zeroed."""
    rng, x, words, word_mask = fusion_inputs
    module = PixelWordAttention()
    params = random_params(rng, module, x, words, word_mask)
    expected = module.apply(params, x, words, word_mask)
    huge = np.where(word_mask[..., None] > 0, words, 1e6 * words)
    np.testing.assert_array_equal(module.apply(params, x, huge, word_mask), expected)


def test_pwam_values_are_masked(fusion_inputs):
    """Without any word all logits are equal; what is summed must be zeros, not the values of padding."""
    rng, x, words, word_mask = fusion_inputs
    module = PixelWordAttention()
    params = random_params(rng, module, x, words, word_mask)
    none = np.zeros_like(word_mask)
    np.testing.assert_array_equal(
        module.apply(params, x, words, none), module.apply(params, x, words[:, ::-1] * 3, none)
    )


def test_pwam_padding_has_no_influence(fusion_inputs):
    rng, x, words, word_mask = fusion_inputs
    module = PixelWordAttention(heads=2)
    params = random_params(rng, module, x, words, word_mask)
    full = module.apply(params, x, words, word_mask)
    cut = module.apply(params, x[:1], words[:1, :3], word_mask[:1, :3])
    np.testing.assert_allclose(full[:1], cut, atol=1e-5)
    assert np.abs(full[:1] - module.apply(params, x[:1], words[:1, :2], word_mask[:1, :2])).max() > 0.01


def test_pwam_dropout_only_while_training(fusion_inputs):
    rng, x, words, word_mask = fusion_inputs
    module = PixelWordAttention(dropout=0.5)
    params = random_params(rng, module, x, words, word_mask)
    still = module.apply(params, x, words, word_mask)
    np.testing.assert_array_equal(still, PixelWordAttention().apply(params, x, words, word_mask))
    rngs = {"dropout": jax.random.key(0)}
    moving = np.asarray(module.apply(params, x, words, word_mask, train=True, rngs=rngs))
    assert 0.2 < (moving == 0).mean() < 0.8


# --- image side --------------------------------------------------------------------------------------------------------


def test_image_alignment_is_plain_pwam_without_pyramids(fusion_inputs):
    rng, x, words, word_mask = fusion_inputs
    maps = x.reshape(2, 2, 3, 8)
    module = ImageAlignment(pyramids=())
    params = random_params(rng, module, maps, words, word_mask)
    assert set(params["params"]) == {"pwam"}
    s, r = module.apply(params, maps, words, word_mask)
    expected = PixelWordAttention().apply({"params": params["params"]["pwam"]}, x, words, word_mask)
    np.testing.assert_array_equal(s, r)
    np.testing.assert_allclose(r, expected.reshape(maps.shape), atol=1e-6)


# --- language side -----------------------------------------------------------------------------------------------------


def language_written_out(p, words, x, query_mask, statistics, row_bias=None):
    """One sample: words [L, T], x [N, C], query_mask [L]; `statistics` the rows that the norm over words looks at."""

    def norm(y, rows=slice(None)):
        return (y - y[rows].mean(0)) / np.sqrt(y[rows].var(0) + 1e-5)

    hidden = words.shape[-1]
    query = (linear(words, p["query"]) * query_mask[:, None]).astype(np.float32)
    key, value = norm(linear(x, p["key"])), norm(linear(x, p["value"]))
    logits = (query @ key.T * np.float32(hidden**-0.5)).astype(np.float32)
    if row_bias is not None:
        logits = logits + row_bias[:, None].astype(np.float32)
    language = linear(softmax(logits) @ value, p["output"])
    language = norm(language, statistics)
    return np.asarray(gelu(linear(np.asarray(gelu(linear(words, p["visual"]))) * language, p["mixed"])))


@pytest.fixture
def language_inputs():
    rng = np.random.default_rng(1)
    words = rng.normal(size=(2, 5, 8)).astype(np.float32)
    x = rng.normal(size=(2, 6, 4)).astype(np.float32)
    word_mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    return rng, words, x, word_mask


@pytest.mark.parametrize("pixels", [6, 9])  # For many, key and value are folded into what is around them.
def test_masked_language_fusion_written_out(language_inputs, pixels):
    rng, words, x, word_mask = language_inputs
    x = 1.0 + rng.normal(size=(2, pixels, 4)).astype(np.float32)
    module = LanguageAlignment("masked")
    params = random_params(rng, module, words, x, word_mask)
    result = module.apply(params, words, x, word_mask)
    for b in range(2):
        real = word_mask[b] > 0
        expected = language_written_out(params["params"], words[b], x[b], word_mask[b], real)
        np.testing.assert_allclose(result[b][real], expected[real], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folding_changes_nothing(dtype):
    """Values and gradients, those of the biases, which are none, aside."""
    rng = np.random.default_rng(4)
    query, x = (
        rng.normal(size=(2, 3, 16)).astype(np.float32),
        2 + rng.normal(size=(2, 40, 8)).astype(np.float32),
    )
    dense = Dense(16, dtype=jnp.float32)
    kernels = rng.normal(size=(2, 8, 16)).astype(np.float32)

    def loss(attend, query, x, kernels, dtype):
        def bound(kernel):
            return dense.clone(dtype=dtype).bind({"params": {"kernel": kernel, "bias": jnp.ones(16)}})

        results = attend(query.astype(dtype), x.astype(dtype), *map(bound, kernels), 0.0)
        return sum((jnp.cos(jnp.arange(r.size)).reshape(r.shape) * r).sum() for r in results)

    expected = jax.value_and_grad(loss, (1, 2, 3))(
        alignment._attend_to_pixels, query, x, kernels, jnp.float32
    )
    found = jax.value_and_grad(loss, (1, 2, 3))(alignment._attend_to_pixels_folded, query, x, kernels, dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_masked_language_fusion_does_not_see_padding(language_inputs):
    rng, words, x, word_mask = language_inputs
    module = LanguageAlignment("masked")
    params = random_params(rng, module, words, x, word_mask)
    result = module.apply(params, words, x, word_mask)
    other = np.where(word_mask[..., None] > 0, words, 5 - 3 * words)
    np.testing.assert_array_equal(
        module.apply(params, other, x, word_mask)[word_mask > 0], result[word_mask > 0]
    )
    cut = module.apply(params, words[:1, :3], x[:1], word_mask[:1, :3])
    np.testing.assert_allclose(cut, result[:1, :3], atol=1e-5)


def test_released_language_fusion_adds_the_mask_before_the_softmax(language_inputs):
    """Near -1e8 the numbers of float32 are 8 apart: added to a row, the mask swallows logits within 4 of zero.

    So padding whose logits are small attends uniformly, and nothing is left of it after the norm over words.
    """
    rng, words, x, word_mask = language_inputs
    module = LanguageAlignment("released")
    params = random_params(rng, module, words, x, word_mask)
    p = params["params"]
    p["query"] = jax.tree.map(lambda w: 2e-5 * w, p["query"])  # Multiplied by -10000 for padding.
    key = np.asarray(instance_norm(linear(x, p["key"])))
    logits = -1e4 * np.einsum("blt,bnt->bln", linear(words, p["query"]), key) * 8**-0.5
    assert 0.5 < np.abs(logits[0, 3:]).max() < 3.9
    result = module.apply(params, words, x, word_mask)
    expected = np.broadcast_to(gelu(p["mixed"]["bias"]), result.shape)  # Equal rows have no variance.
    np.testing.assert_allclose(result, expected, atol=1e-3)


def test_released_language_fusion_written_out(language_inputs):
    """Real words attend uniformly; padding, with logits far apart, to one pixel."""
    rng, words, x, word_mask = language_inputs
    module = LanguageAlignment("released")
    params = random_params(rng, module, words, x, word_mask)
    mask = (word_mask - 1) * np.float32(1e4)
    result = module.apply(params, words, x, word_mask)
    p = params["params"]
    key = np.asarray(instance_norm(linear(x, p["key"])))
    logits = np.sort(-1e4 * np.einsum("blt,bnt->bln", linear(words, p["query"]), key) * 8**-0.5, -1)
    assert (logits[0, 3:, -1] - logits[0, 3:, -2]).min() > 200  # Rounding decides nothing.
    for b in range(2):
        expected = language_written_out(p, words[b], x[b], mask[b], slice(None), 1e4 * mask[b] - 1e4)
        np.testing.assert_allclose(result[b], expected, atol=1e-3)
    # float32 whatever the compute type.
    rough = LanguageAlignment("released", jnp.bfloat16).apply(params, words, x, word_mask)
    np.testing.assert_array_equal(rough, result.astype(jnp.bfloat16))


# --- gates -------------------------------------------------------------------------------------------------------------


def gate_gradients(gate, params, r):
    """Gradient norms of the two linears for a loss that wants r + gate(r) * r to change."""

    def loss(params):
        y = r + gate.apply(params, r) * r
        return jnp.sum((y - 2 * r[::-1]) ** 2)

    gradient = jax.grad(loss)(params)
    norms = {name: float(jnp.linalg.norm(leaf["kernel"])) for name, leaf in gradient["params"].items()}
    return gradient, norms


@pytest.mark.parametrize("activation", [gelu, relu])
def test_an_open_gate_is_closed_at_first_and_learns(activation):
    r = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    gate = Gate("open", activation)
    params = gate.init(jax.random.key(0), r)
    assert np.std(params["params"]["fc1"]["kernel"]) == pytest.approx(0.02, rel=0.3)
    assert (np.asarray(gate.apply(params, r)) == 0).all()
    gradient, norms = gate_gradients(gate, params, r)
    assert norms["fc1"] == 0
    assert norms["fc2"] > 0.01
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    _, norms = gate_gradients(gate, params, r)
    assert min(norms.values()) > 0.001


def test_other_gates():
    r = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    gate = Gate("normal", gelu)
    params = gate.init(jax.random.key(0), r)
    assert min(gate_gradients(gate, params, r)[1].values()) > 1e-4
    expected = np.tanh(
        np.asarray(gelu(r @ params["params"]["fc1"]["kernel"])) @ params["params"]["fc2"]["kernel"]
    )
    np.testing.assert_allclose(gate.apply(params, r), expected, atol=1e-6)
    gate = Gate("zero", jax.nn.relu)
    params = gate.init(jax.random.key(0), r)
    assert gate_gradients(gate, params, r)[1] == {"fc1": 0, "fc2": 0}


@pytest.mark.parametrize(
    ("gate_init", "starts"),
    [
        ("open", {"image_gate": "open", "text_gate": "open"}),
        ("released", {"image_gate": "normal", "text_gate": "zero"}),
    ],
)
def test_gates_of_the_network(gate_init, starts):
    config = debug.get_config().model
    config.bert.vocab_size = 8
    config.gate_init = gate_init
    model = build_model(config)
    words = np.ones((1, 4), np.int32)
    bound = model.bind({}, rngs={"params": jax.random.key(0)})
    for side, start in starts.items():
        gates = getattr(bound, side)
        assert [gate.start for gate in gates] == [start] * 4
        assert {gate.activation for gate in gates} == {gelu if side == "image_gate" else relu}
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)), words, words)["params"]
    assert {f"{side}_{k}" for side in starts for k in range(4)} <= set(shapes)


def test_without_the_alignment_module_words_never_see_the_image():
    config = debug.get_config().model
    config.bert.vocab_size = 8
    config.alignment = False
    model = build_model(config)
    words, image = np.ones((1, 4), np.int32), np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, words, words)
    names = {name.rsplit("_", 1)[0] for name in shapes["params"]}
    assert not names & {"text_fusion", "text_gate", "text_norm"}
    assert set(shapes["params"]["image_fusion_0"]) == {"pwam"}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    apply = jax.jit(lambda image: model.apply(params, image, words, words).word_features)
    np.testing.assert_array_equal(
        apply(image), apply(image + rng.normal(size=image.shape).astype(np.float32))
    )
