"""The training loop under pmap, with a running mean of the parameters, and with forms that cannot be."""

import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from magnet_jax.errors import UserError
from magnet_jax.train import train
from magnet_jax.workdir import History
from tests.test_train import every_step, final_state, stop_at
from tests.tiny import tiny_config, tiny_network


@pytest.fixture(autouse=True)
def _tiny():
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run by jit that was never stopped."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with tiny_network():
        train(every_step(tiny_config()), workdir)
    return workdir


def test_pmap_trains_stops_and_resumes_as_jit_does(tmp_path, undisturbed):
    """Two devices; stopped half-way under pmap and finished by jit, it is the run that jit did alone, up to rounding."""
    config = every_step(tiny_config())
    config.parallelism = "pmap"
    with stop_at(7, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train(config, tmp_path) == {}
    config.parallelism = "jit"
    train(config, tmp_path)
    expected = final_state(undisturbed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), final_state(tmp_path), expected)


def test_a_run_under_pmap_has_all_that_a_run_leaves(tmp_path):
    config = tiny_config()
    config.parallelism = "pmap"
    results = train(config, tmp_path)
    assert results["val"]["squash"]["count"] == config.eval.examples
    assert (tmp_path / "curves.png").exists()
    assert [row["step"] for row in History(tmp_path).read() if "train/loss" in row] == [1, 4, 8, 12]


def test_the_running_mean_is_what_is_evaluated_and_survives_a_stop(tmp_path):
    """Against the mean written out over the parameters of every step."""
    config = tiny_config()
    config.train.ema, config.train.eval_every, config.checkpoint.every_steps = 0.7, 0, 1
    config.checkpoint.keep = 100
    with stop_at(5, lambda: signal.raise_signal(signal.SIGTERM)):
        train(config, tmp_path / "ema")
    train(config, tmp_path / "ema")
    plain = tiny_config()
    plain.train.eval_every, plain.checkpoint.every_steps, plain.checkpoint.keep = 0, 1, 100
    train(plain, tmp_path / "plain")

    def arrays(name, step):
        path = (tmp_path / name / "checkpoints" / str(step)).absolute()
        items = {item: ocp.StandardCheckpointer().restore(path / item) for item in ("variables", "rest")}
        return items["variables"]["params"], items["rest"].get("params")

    mean = None
    for step in range(1, 13):
        params = arrays("plain", step)[0]
        if step == 1:  # It begins at the initial parameters, which no checkpoint has.
            shown, _ = arrays("ema", 1)
            initial = jax.tree.map(lambda m, p: (m - 0.3 * p) / 0.7, shown, params)
            mean = initial
        mean = jax.tree.map(lambda m, p: 0.7 * m + 0.3 * p, mean, params)
        shown, raw = arrays("ema", step)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), raw, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shown, mean)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (mean, params)), strict=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train.accumulate": 3}, "config.data.batch_size is 4; expected a multiple of the 6 devices times"),
        ({"parallelism": "pjit"}, "config.parallelism is 'pjit'"),
        ({"sharding": ((".*", "model"),)}, "config.sharding has the tactic 'model'"),
    ],
)
def test_parallelism_that_cannot_be_is_refused(tmp_path, fields, words):
    config = tiny_config()
    for name, value in fields.items():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
