"""The study: its variants, one run, and the grid that survives being stopped."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from configs import ablation_refcoco, ablation_shapes
from configs.ablation import STUDIES, VARIANTS
from magnet_jax import study
from magnet_jax.errors import UserError
from magnet_jax.network import build_network
from magnet_jax.programs import complete
from magnet_jax.sharding import path_name
from magnet_jax.study import Run, config_hash, execute_all, is_done, result_file
from magnet_jax.study_run import execute, pair_figures
from magnet_jax.trained import batch_shapes
from tests.tiny import tiny_network

TINY = """
from configs import debug
from configs.ablation import STUDIES, VARIANTS, Variant

FLAVOURS = {"mixed": {}, "short": {"data.options.flavour": "refcoco"}}
VARIANTS = {"baseline": Variant("baseline", {}, ""), "slow": Variant("slow", {}, "baseline")}
STUDIES = {"ablation": ("baseline", "slow")}


def get_config(variant):
    c = debug.get_config()
    c.data.options.flavour = "mixed"
    c.loss.grounding = c.loss.alignment = 0.0
    c.train.steps = 4
    c.eval.protocols = ("squash",)
    if variant == "slow":
        c.optimizer.learning_rate = 1e-5
    return c
"""


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(TINY)
    return str(file)


def test_variants_are_what_they_say():
    def uses(name, module):
        c = module.get_config(name)
        return c.model.name, c.model.get("alignment"), c.loss.grounding > 0, c.loss.alignment > 0

    for module in (ablation_shapes, ablation_refcoco):
        parts = {name: uses(name, module) for name in VARIANTS}
        assert parts["baseline"] == ("magnet", False, False, False)
        assert parts["mg"] == ("magnet", False, True, False)
        assert parts["cam"] == ("magnet", True, False, False)
        assert parts["cal"] == ("magnet", False, False, True)
        assert parts["all"] == ("magnet", True, True, True)
        assert parts["lavt"] == ("lavt", None, False, False)
        assert parts["lavt_mg"] == ("lavt", None, True, False)
        hashes = {name: config_hash(module.get_config(name)) for name in VARIANTS}
        assert len(set(hashes.values())) == len(VARIANTS)  # None is another under a second name.
        # Steps, data and optimizer are those of the baseline in every variant.
        same = ("data", "optimizer", "train", "eval", "seed")
        baseline = module.get_config("baseline").to_dict()
        for name in VARIANTS:
            config = module.get_config(name).to_dict()
            assert {key: config[key] for key in same} == {key: baseline[key] for key in same}, name
    for names in STUDIES.values():
        assert set(names) <= set(VARIANTS)
    assert all(variant.reference in ("", *VARIANTS) for variant in VARIANTS.values())
    with pytest.raises(ValueError, match="unknown variant 'magic'"):
        ablation_shapes.get_config("magic")


@pytest.mark.parametrize("module", [ablation_shapes, ablation_refcoco])
def test_networks_can_be_built(module):
    for name in ("baseline", "all", "lavt_mg"):
        config = complete(module.get_config(name))[0]
        network = build_network(config)
        shapes = jax.eval_shape(
            lambda network=network, config=config: network.init(jax.random.key(0), batch_shapes(config))
        )
        assert ("grounding" in shapes["params"]) == (config.loss.grounding > 0)
        if (
            name == "all"
        ):  # What is to learn faster must be there under that name, or it would not, without a word.
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])]
            for pattern, _ in config.optimizer.lr_multipliers:
                assert any(re.search(pattern, found) for found in names), pattern


def test_one_run(tiny, tmp_path):
    run = Run(tiny, "short", "slow", 3)
    with tiny_network():
        execute(run, tmp_path)
    result = json.loads(result_file(tmp_path, run).read_text())
    assert (result["variant"], result["seed"], result["steps"], result["reference"]) == (
        "slow",
        3,
        4,
        "baseline",
    )
    assert (
        result["config_hash"]
        == config_hash(run.config())
        == config_hash(Run(tiny, "short", "slow", 0).config())
    )
    assert result["flops_per_step"] > 0
    assert set(result["splits"]["val"]) >= {"squash", "shuffled_text"}
    pairs = result["counterfactual"]["val"]
    assert pairs["count"] == sum(word["count"] for word in pairs["words"].values()) > 0
    assert {row["step"] for row in result["history"]} >= {4}
    assert is_done(tmp_path, run)
    assert not is_done(tmp_path, Run(tiny, "short", "slow", 4))
    Path(tiny).write_text(TINY.replace("1e-5", "1e-4"))
    with pytest.raises(UserError, match="of another configuration .* delete it"):
        is_done(tmp_path, run)


def test_a_run_is_claimed_by_one_process(tmp_path, monkeypatch):
    run = Run("x.py", "short", "slow", 3)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    with study.claim(tmp_path, run) as held:
        assert study.claim(tmp_path, run) is None
        process = study._start(run, tmp_path, [0], held)
    assert study.claim(tmp_path, run) is None  # The process has it now.
    process.kill()
    process.wait()
    study.claim(tmp_path, run).close()


@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_other_processes_are_waited_for(tiny, tmp_path, monkeypatch, capsys, finished):
    """And taken over where these end without a result."""
    runs = [Run(tiny, "mixed", "baseline", seed) for seed in (0, 1)]
    start, started = stand_in(tmp_path)
    monkeypatch.setattr(study, "_start", start)
    held, said = study.claim(tmp_path, runs[0]), ""
    with ThreadPoolExecutor() as pool:
        grid = pool.submit(execute_all, runs, tmp_path, 1)
        while "waiting" not in said:
            time.sleep(0.05)
            said += capsys.readouterr().out
            assert not grid.done()
        assert "waiting for other processes, which work on mixed.baseline.0\n" in said
        assert [name for name, _ in started] == ["mixed.baseline.1"]
        if finished:
            result_file(tmp_path, runs[0]).write_text(
                json.dumps({"config_hash": config_hash(runs[0].config())})
            )
        held.close()
    assert grid.result() is None
    assert len(started) == (1 if finished else 2)
    assert is_done(tmp_path, runs[0])


def test_seeds_said_twice_are_run_once(tiny, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(study, "execute_all", lambda runs, *_: asked.extend(runs))
    assert (
        study.main([f"--out={tmp_path}", f"--config={tiny}", "--seeds=1,0,1"]) == 1
    )  # No results to report on.
    assert [(run.seed, run.variant) for run in asked] == [
        (seed, variant) for seed in (1, 0) for variant in ("baseline", "slow")
    ]


def test_pairs_count_where_both_are_right():
    found = pair_figures(
        [True, True, True, False, False, False, True, True], ["a", "a", "b", "b", "a", "a", "b", "b"]
    )
    assert found["both"] == 50
    assert found["one"] == 25
    assert found["words"]["a"] == {"both": 50, "one": 0, "count": 2}
    assert found["words"]["b"] == {"both": 50, "one": 50, "count": 2}


def stand_in(out, fails=()):
    """Instead of a training, a process that writes the result's hash, or ends with an error."""

    def start(run, folder, cores, held):
        program = "import sys; sys.exit(3)"
        if run.name not in fails:
            file = result_file(folder, run)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"config_hash": config_hash(run.config())})
            program = f"open({str(file)!r}, 'w').write({content!r})"
        started.append((run.name, tuple(cores)))
        return subprocess.Popen([sys.executable, "-c", program])

    started = []
    return start, started


@pytest.mark.parametrize("jobs", [1, 2])
def test_grid_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch, jobs):
    runs = [Run(tiny, "mixed", variant, seed) for seed in (0, 1) for variant in ("baseline", "slow")]
    start, started = stand_in(tmp_path, fails=(runs[2].name,))
    monkeypatch.setattr(study, "_start", start)
    with pytest.raises(
        UserError, match=r"run mixed.baseline.1 ended with exit code 3 \(\); see .*mixed.baseline.1.log"
    ):
        execute_all(runs, tmp_path, jobs)
    assert is_done(tmp_path, runs[0])
    assert is_done(tmp_path, runs[1])
    done = [run.name for run in runs if is_done(tmp_path, run)]
    start, started = stand_in(tmp_path)
    monkeypatch.setattr(study, "_start", start)
    execute_all(runs, tmp_path, jobs)
    assert {name for name, _ in started} == {run.name for run in runs} - set(done)
    assert all(is_done(tmp_path, run) for run in runs)
    if jobs == 2 and len(started) == 2:
        assert not set(started[0][1]) & set(started[1][1])  # Each has cores of its own.


def test_wrong_words_end_with_a_line(tmp_path, tiny, capsys):
    out = f"--out={tmp_path / 'out'}"
    for arguments, message in (
        (["--study=magic"], "--study is 'magic'; configs/ablation_shapes.py has ablation"),
        (["--flavours=long"], "--flavours has 'long'; configs/ablation_shapes.py has 'mixed', 'refcoco'"),
        (["--jobs=0"], "--jobs is 0; expected 1 or more"),
        (["--seeds=a"], "--seeds is 'a'; expected numbers"),
        (["--config=nothing.py"], "--config is 'nothing.py'; expected a Python file"),
        (["--config=configs/shapes.py"], "has no FLAVOURS, STUDIES, VARIANTS"),
        (["--report"], "no results in"),
    ):
        assert study.main([out, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
