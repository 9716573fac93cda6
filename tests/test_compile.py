"""Compiling for hardware that is not here: on virtual CPU devices, whose compiler is always there."""

import json
import re
from types import SimpleNamespace
from unittest import mock

import jax
import pytest

from magnet_jax import hardware, programs
from magnet_jax.compile import HEADER, QUICK, _of_compiled, compile_all, compile_for, line
from magnet_jax.errors import UserError
from magnet_jax.network import Network
from magnet_jax.programs import complete
from tests.tiny import TinyModel, tiny_config


@pytest.fixture(autouse=True)
def _tiny():
    with mock.patch.object(programs, "build_network", return_value=Network(TinyModel())):
        yield


def ready(**fields):
    config = complete(tiny_config())[0]
    config.optimizer.flatten = False
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def test_report_of_a_step_on_two_devices(tmp_path, capsys):
    (report,) = compile_all(tiny_config(), ["cpu:2"], "train", str(tmp_path / "new" / "report.json"))
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == [report]
    assert (report["fits"], report["devices"], report["mesh"]) == (True, 2, {"data": 2})
    # Every gradient crosses once, and some sums with it.
    assert (
        4 * report["parameters"]
        <= report["collectives"]["all-reduce"]["bytes"]
        < 4 * report["parameters"] + 4000
    )
    assert report["wire_bytes"] == report["collectives"]["all-reduce"]["bytes"]
    # Parameters and Adam's two moments come in and, in their place, go out.
    state = 3 * 4 * report["parameters"]
    assert state < report["bytes"]["arguments"] < state + 10**5
    assert state <= report["bytes"]["aliased"] <= report["bytes"]["outputs"]
    shown = capsys.readouterr().out.splitlines()
    assert HEADER in shown
    assert shown[-1].split()[:4] == ["cpu:2", "data", "2", "4"]


def test_an_eval_step_has_no_gradient_to_send():
    report = compile_for(ready(), "cpu:2", "eval")
    assert report["wire_bytes"] < 10**5
    assert report["batch_size"] == 8
    assert report["flops"] < compile_for(ready(data__batch_size=8), "cpu:2")["flops"]


def test_quick_asks_for_less_optimisation_and_tells_no_time():
    options = []
    compile_ = jax.stages.Lowered.compile
    with mock.patch.object(
        jax.stages.Lowered,
        "compile",
        lambda self, compiler_options: options.append(compiler_options) or compile_(self, compiler_options),
    ):
        quick, whole = (compile_for(ready(), "cpu:2", "train", quick) for quick in (True, False))
    assert options == [{"optimization_level": QUICK}, {}]
    assert quick["wire_bytes"] == whole["wire_bytes"]
    assert quick["bytes"]["arguments"] == whole["bytes"]["arguments"]
    sizes = {f"{kind}_size_in_bytes": 0 for kind in ("argument", "output", "temp", "generated_code", "alias")}
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    text = re.sub(r"cycles=(\d+)", r'backend_config={"estimated_cycles":"\1"}', OF_A_TPU)
    about = {"batch_size": 8, "devices": 4, "flops": 4e6, "quick": True}
    assert "seconds" not in _of_compiled(compiled, text, {}, hardware.CHIPS["v5e"], about)


def test_what_does_not_fit_is_no_crash():
    full = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G."
    )
    with mock.patch.object(jax.stages.Lowered, "compile", side_effect=full):
        report = compile_for(ready(), "cpu:1")
    assert report["fits"] is False
    assert report["bytes"] == {"total": 24.5 * 2**30, "limit": 15.75 * 2**30}
    assert line(report).split()[4:8] == ["NO", "24.5", "of", "15.8"]


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2xa", "h100:2x2", "cpu:0", "v5e:"])
def test_topologies_that_are_none(name):
    with pytest.raises(UserError, match=r"--topology has '.*'; expected a chip of v5e, v5p, v6e, h100, cpu"):
        compile_for(ready(), name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda")])
def test_a_compiler_that_is_not_installed_says_how(monkeypatch, name, extra):
    def absent(*_, **__):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", absent)
    with pytest.raises(
        UserError, match=f"no plugin; its compiler .* pip install -r requirements-compile-{extra}.txt"
    ):
        compile_for(ready(), name)


def test_what_does_not_suit_the_topology_is_refused():
    with pytest.raises(UserError, match="config.data.batch_size is 3; cpu:2 needs a multiple of 2"):
        compile_for(ready(data__batch_size=3), "cpu:2")
    with pytest.raises(UserError, match="--step is 'serve'"):
        compile_for(ready(), "cpu:2", "serve")
    with pytest.raises(UserError, match="does not fit the 2 devices"):
        compile_for(ready(mesh=(("data", 3),)), "cpu:2")


OF_A_TPU = """HloModule jit_step

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[1000]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%x), metadata={op_name="jvp(MagNet)/stage_2/mul"}, cycles=3000
  %fusion.2 = f32[4]{0} fusion(%x), metadata={op_name="transpose(jvp(M))/stage_2/mul"}, cycles=1500
  ROOT %gather.1 = f32[500]{0} gather(%x, %x), metadata={op_name="jit(step)/jvp(MagNet)/decoder/layer_0/attn/gather"}
}
"""


def test_time_on_a_tpu_by_part():
    """Cycles over the clock where the compiler tells them, else bytes over the memory's bandwidth, and these listed."""
    chip = hardware.CHIPS["v5e"]
    sizes = {f"{kind}_size_in_bytes": 0 for kind in ("argument", "output", "temp", "generated_code", "alias")}
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    text = re.sub(r"cycles=(\d+)", r'backend_config={"estimated_cycles":"\1"}', OF_A_TPU)
    report = _of_compiled(
        compiled, text, {}, chip, {"batch_size": 8, "devices": 4, "flops": 4e6, "quick": False}
    )
    size = 4 * (500 + 1000 + 1000)
    assert report["parts"] == {
        "deformable attention": {"forward": pytest.approx(size / chip.bandwidth), "backward": 0},
        "Swin stage 3": {
            "forward": pytest.approx(3000 / chip.clock),
            "backward": pytest.approx(1500 / chip.clock),
        },
    }
    assert report["seconds"] == pytest.approx(4500 / chip.clock + size / chip.bandwidth)
    assert report["images_per_second_per_device"] == pytest.approx(2 / report["seconds"])
    assert report["utilisation"] == pytest.approx(1e6 / report["seconds"] / chip.peak)
    assert report["silent"] == [{"operation": "gather.1", "part": "deformable attention", "bytes": size}]
