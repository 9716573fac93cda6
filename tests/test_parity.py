"""The network against outputs and gradients of the published one; bfloat16 against float32."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from magnet_jax.network import build_model
from tests import parity

DATA = Path(__file__).parent / "data"
GRADIENTS = DATA / "magnet_micro_grads.json"


def paths(name):
    return [str(DATA / f"{name}.json"), str(DATA / f"{name}.npz")]


def remembered(function):
    """Keyed by what tells the manifests apart, since the arguments cannot be hashed."""
    results = {}

    def call(manifest, *rest):
        key = manifest["kind"], manifest["salt"]
        if key not in results:
            results[key] = function(manifest, *rest)
        return results[key]

    return call


@pytest.fixture(scope="module", autouse=True)
def _compute_once():
    """Every network is built, run and differentiated once for all tests."""
    names = ("build", "relative_errors", "gradient_norms")
    with mock.patch.multiple(parity, **{name: remembered(getattr(parity, name)) for name in names}):
        yield


def load(name):
    manifest, outputs = paths(name)
    with np.load(outputs) as file:
        return json.loads(Path(manifest).read_text()), dict(file)


# LAVT's instance norms amplify rounding.
@pytest.mark.parametrize(
    ("name", "tolerance"), [("magnet_micro", 2e-5), ("magnet_odd", 2e-5), ("lavt_micro", 1e-4)]
)
def test_outputs(name, tolerance):
    manifest, reference = load(name)
    errors = parity.relative_errors(manifest, reference)
    assert set(errors) == set(reference) - {"input_ids", "attention_mask"}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def test_gradients():
    manifest, reference = load("magnet_micro")
    expected = json.loads(GRADIENTS.read_text())
    value, norms = parity.gradient_norms(manifest, reference, np.asarray(expected["target"], np.float32))
    assert value == pytest.approx(expected["total"], rel=1e-5)
    compared = 0
    for name, norm in expected["grad_norm"].items():
        if norm is None:
            assert norms[name] == 0, name
        elif norm > 1e-4:
            compared += 1
            assert norms[name] == pytest.approx(norm, rel=1e-3), name
    assert compared == 872


def test_command_line_tells_agreement_by_its_exit_code(capsys, tmp_path):
    assert parity.main(paths("magnet_odd")) == 0
    assert capsys.readouterr().out.count(" ok\n") == 10
    assert parity.main([*paths("magnet_odd"), "--tolerance", "1e-9"]) == 1
    assert "ABOVE 1e-09" in capsys.readouterr().out

    assert parity.main([*paths("magnet_micro"), "--gradients", str(GRADIENTS)]) == 0
    expected = json.loads(GRADIENTS.read_text())
    broken = tmp_path / "gradients.json"
    broken.write_text(json.dumps(expected | {"total": expected["total"] * 1.01}))
    assert parity.main([*paths("magnet_micro"), "--gradients", str(broken)]) == 1
    norms = expected["grad_norm"]
    norms["classifier.predictor.decoder_norm.weight"] *= 1.01
    broken.write_text(json.dumps(expected))
    assert parity.main([*paths("magnet_micro"), "--gradients", str(broken)]) == 1
    norms["classifier.predictor.decoder_norm.weight"] = None  # Said to have no path, but has one.
    broken.write_text(json.dumps(expected))
    assert parity.main([*paths("magnet_micro"), "--gradients", str(broken)]) == 1


def test_command_line_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(Path(parity.__file__).resolve()), "--help"]
    assert "--gradients" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout


@pytest.mark.parametrize("language_fusion", ["masked", "released"])
def test_bfloat16_stays_near_float32(language_fusion):
    """The smallest network on a full sentence and one with padding.

    Words are compared for 'masked' only: 'released' multiplies the queries of padding by 10000, so that the smallest
    difference decides which pixel they look at.
    """
    rng = np.random.default_rng(0)
    word_mask = (np.arange(8) < np.array([[8], [4]])).astype(np.int32)
    inputs = rng.normal(size=(2, 32, 32, 3)).astype(np.float32), rng.integers(4, 32, (2, 8)), word_mask
    config = debug.get_config().model
    config.bert.vocab_size = 32
    config.pyramids = (2,)
    config.mask_predictor.layers = 1
    config.language_fusion = language_fusion
    model = build_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda s: _values(rng, s), shapes)
    config.dtype = "bfloat16"
    exact = jax.jit(model.apply)(params, *inputs)
    rough = jax.jit(build_model(config).apply)(params, *inputs)
    for name in ("mask_logits", "class_logits", "aux_mask_logits"):
        assert getattr(rough, name).dtype == jnp.float32, name
    assert rough.mask_features.dtype == jnp.bfloat16
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(rough))

    def compared(output):
        arrays = {"mask_logits": output.mask_logits, "mask_features": output.mask_features}
        arrays |= {f"s{k + 1}": x for k, x in enumerate(output.stage_features)}
        if language_fusion == "masked":
            arrays["words"] = output.word_features[word_mask > 0]
        return {name: np.asarray(x, np.float64) for name, x in arrays.items()}

    other = compared(rough)
    for name, x in compared(exact).items():
        assert np.abs(x - other[name]).mean() < 0.05 * np.abs(x).max(), name


def _values(rng, shape):
    if len(shape.shape) == 1:
        return (0.1 * rng.normal(size=shape.shape)).astype(np.float32)
    return (rng.normal(size=shape.shape) / np.sqrt(np.prod(shape.shape[:-1]))).astype(np.float32)
