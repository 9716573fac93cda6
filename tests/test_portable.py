"""A network as a folder: others run it as it is, and this project as before."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from magnet_jax import portable
from magnet_jax.errors import UserError
from magnet_jax.network import Network
from magnet_jax.predict import Predictor
from magnet_jax.sharding import make_mesh
from magnet_jax.train import train
from magnet_jax.trained import load_trained
from tests.test_predict import TEXTS, pictures, trained


@pytest.fixture(scope="module", params=[pytest.param("magnet", marks=pytest.mark.slow), "lavt"])
def exported(request, tmp_path_factory):
    """The network, and its folder."""
    found = trained(request.param)
    folder = tmp_path_factory.mktemp("portable") / "net"
    portable.write_portable(found, folder)
    return found, folder


def test_program_gives_what_the_network_gives(exported):
    network, folder = exported
    program = jax.export.deserialize(bytearray((folder / "network.stablehlo").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    rng, side = np.random.default_rng(0), network.config.data.image_size
    images = rng.integers(0, 256, (3, side, side, 3)).astype(np.uint8)
    ids, mask, _ = network.tokenizer.encode(TEXTS)
    expected = jax.jit(network.network.apply)(
        network.variables, {"image": images, "text_ids": ids, "text_mask": mask}
    )
    for count in (1, 3):  # Any number of pairs.
        found = program.call(network.variables, images[:count], ids[:count], mask[:count])
        assert ("class_logits" in found) == (expected.class_logits is not None)
        for name, logits in found.items():
            wanted = getattr(expected, name)[:count]
            assert logits.shape[0] == count
            np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


def test_any_number_of_pairs():
    """Of MagNet too, whose other tests here are slow."""
    program = portable.program_of(trained("magnet"))
    *_, image, _, _ = program.in_avals
    assert not isinstance(image.shape[0], int)
    assert {aval.shape[0] for aval in program.out_avals} == {image.shape[0]}


def test_no_kernels_within(exported):
    """They are of one platform, and of batches of a known size."""
    program = jax.export.deserialize(bytearray((exported[1] / "network.stablehlo").read_bytes()))
    assert "tpu_custom_call" not in program.mlir_module()


def test_example_needs_nothing_of_ours(exported, tmp_path):
    network, folder = exported
    picture = pictures(1)[0]
    picture.save(tmp_path / "x.png")
    hidden = "import sys; sys.modules.update({'flax': None, 'magnet_jax': None, 'input_pipeline': None}); "
    run = f"{hidden}import runpy; sys.argv = ['load.py', 'x.png', {TEXTS[1]!r}]; runpy.run_path({str(folder / 'load.py')!r})"
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=True)
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    prediction = Predictor(network).predict(picture, [TEXTS[1]])[0]
    sure = np.abs(prediction.logits) > 1e-5 * np.abs(prediction.logits).max()
    np.testing.assert_array_equal(found[sure], prediction.mask[sure])
    assert sure.mean() > 0.99


def test_predictor_takes_the_folder(exported):
    network, folder = exported
    predictor = Predictor.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, predictor.trained.variables, network.variables)
    picture = pictures(1)[0]
    found, expected = (p.predict(picture, TEXTS) for p in (predictor, Predictor(network)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5 * np.abs(b.logits).max())


def test_nothing_is_overwritten_or_left_half(exported, tmp_path, monkeypatch):
    network, folder = exported
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="is there already; give a name that is new"):
        portable.write_portable(network, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(portable, "save_variables", fail)
    with pytest.raises(OSError, match="full"):
        portable.write_portable(network, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_network_are_refused(exported):
    _, folder = exported
    file = folder / "config.json"
    text = file.read_text()
    config = json.loads(text)
    config["model"]["bert"]["intermediate"] += 8
    file.write_text(json.dumps(config))
    try:
        with pytest.raises(UserError, match=r"does not fit the configuration: \d+ arrays differ: .*fc1"):
            Predictor.from_pretrained(folder)
    finally:
        file.write_text(text)


def test_a_network_without_heads_for_training_comes_back(tmp_path):
    """As imported weights are: their configuration names losses, and where they came from."""
    network = trained("lavt")
    config = network.config.copy_and_resolve_references()
    config.loss.grounding = config.loss.alignment = 1.0
    config.init.lavt = "weights/lavt"
    alone = dataclasses.replace(
        network,
        config=config,
        network=Network(network.network.model),
        variables=network.variables | {"params": {"model": network.variables["params"]["model"]}},
    )
    portable.write_portable(alone, tmp_path / "net")
    found = load_trained(tmp_path / "net")
    assert found.config.init.lavt == ""
    jax.tree.map(np.testing.assert_array_equal, found.variables, alone.variables)
    with pytest.raises(UserError, match="holds an exported network"):
        train(found.config, tmp_path / "net")


def test_devices_of_the_training_stay_behind(exported):
    network, _ = exported
    config = network.config.copy_and_resolve_references()
    config.mesh, config.sharding = (("data", 2), ("fsdp", 8)), ((".*", "fsdp"),)
    config.cpu_devices, config.parallelism = 16, "pmap"
    own = portable._own_config(dataclasses.replace(network, config=config))
    assert make_mesh(own.mesh).size == jax.device_count()
    assert (own.sharding, own.cpu_devices, own.parallelism) == (((".*", "replicate"),), 1, "jit")
