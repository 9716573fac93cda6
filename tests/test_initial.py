"""Starting a network from imported weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from configs.lavt_refcoco import use_lavt
from magnet_jax.errors import UserError
from magnet_jax.initial import fill, load_initial, resample_table, with_imported_sizes
from magnet_jax.pretrained import expected_shapes, import_weights
from magnet_jax.weight_names import flat_variables, nested_variables
from tests.test_pretrained import FIELDS, MAGNET, SWIN, arrays_of, published


def experiment(kind="magnet", **init):
    """A configuration whose network has the sizes of `FIELDS`."""
    config = debug.get_config()
    if kind == "lavt":
        use_lavt(config)
    for section, fields in FIELDS[kind].items():
        if isinstance(fields, dict):
            config.model[section].update(fields)
        else:
            config.model[section] = fields
    if kind == "magnet":
        config.model.pyramids = (1, 2, 3, 6)
    config.init.update(init)
    return config


def start(variables, config):
    """Variables with the imported arrays in them, and what is said of it."""
    arrays, lines = load_initial(variables, config)
    return fill(variables, arrays), lines


def variables_of(kind):
    """Zeros in the shape of a network's variables, with a head for training."""
    flat = {name: jnp.zeros(shape) for name, shape in expected_shapes(kind, FIELDS[kind]).items()}
    model = nested_variables(flat)
    params = {"model": model["params"], "grounding": {"head": jnp.zeros(3)}}
    return {"params": params, "batch_stats": model["batch_stats"]}


def imported(kind, tmp_path):
    out = tmp_path / kind
    import_weights(kind, published(kind, tmp_path / f"{kind}.safetensors"), out)
    return str(out)


@pytest.mark.parametrize("kind", ["magnet", "lavt"])
def test_a_whole_network(kind, tmp_path):
    out = imported(kind, tmp_path)
    variables, lines = start(variables_of(kind), experiment(kind, **{kind: out}))
    found = flat_variables({"params": variables["params"]["model"], "batch_stats": variables["batch_stats"]})
    for name, x in arrays_of(kind).items():
        np.testing.assert_array_equal(found[name], x)
    assert lines[0] == f"{kind}: {len(found)} arrays from '{out}'"
    assert lines[1] == "newly initialised, in whole or in part: grounding"


def test_encoders(tmp_path):
    paths = {kind: imported(kind, tmp_path) for kind in ("swin", "bert")}
    variables, lines = start(variables_of("magnet"), experiment(**paths))
    found = flat_variables({"params": variables["params"]["model"]})
    loaded = arrays_of("swin") | arrays_of("bert")
    assert {name.split("/")[0] for name in loaded} == {"image", "text"}
    for name, x in found.items():
        np.testing.assert_array_equal(x, loaded.get(name, 0))
    assert {line.split(":")[0] for line in lines[:2]} == {"swin", "bert"}
    for part in ("decoder", "predictor", "image_fusion_0", "text_gate_3", "lang_proj", "grounding"):
        assert part in lines[2].split(": ")[1].split(", ")
    assert "image," not in lines[2]


def test_bias_tables_of_another_window_are_resampled(tmp_path):
    path = imported("swin", tmp_path)
    variables = variables_of("lavt")
    block = variables["params"]["model"]["image"]["stage_0"]["block_0"]["attn"]
    block["relative_position_bias"] = jnp.zeros((121, 1))
    found, lines = start(variables, experiment("lavt", swin=path))
    table = found["params"]["model"]["image"]["stage_0"]["block_0"]["attn"]["relative_position_bias"]
    original = arrays_of("swin")["image/stage_0/block_0/attn/relative_position_bias"]
    np.testing.assert_array_equal(table, resample_table(original, 121))
    assert "1 bias tables resampled" in lines[0]


def test_resampled_tables():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(49, 3)).astype(np.float32)
    np.testing.assert_allclose(resample_table(table, 49), table, atol=1e-6)
    np.testing.assert_allclose(resample_table(np.full((49, 2), 1.5, np.float32), 169), 1.5, rtol=1e-5)
    wide = resample_table(table, 169).reshape(13, 13, 3)
    turned = resample_table(table.reshape(7, 7, 3).transpose(1, 0, 2).reshape(49, 3), 169).reshape(13, 13, 3)
    np.testing.assert_allclose(turned, wide.transpose(1, 0, 2), atol=1e-5)
    flipped = resample_table(table.reshape(7, 7, 3)[::-1].reshape(49, 3), 169).reshape(13, 13, 3)
    np.testing.assert_allclose(flipped, wide[::-1], atol=1e-5)
    np.testing.assert_allclose(
        wide[6, 6], table.reshape(7, 7, 3)[3, 3], atol=1e-5
    )  # The centre is the centre.


def test_what_does_not_fit_is_told(tmp_path):
    path = imported("bert", tmp_path)
    variables = variables_of("magnet")
    variables["params"]["model"]["text"]["layer_0"]["fc1"]["bias"] = jnp.zeros(13)
    with pytest.raises(
        UserError, match=r"config.init.bert .* 1 arrays differ: text/layer_0/fc1/bias: \(12,\) there"
    ):
        start(variables, experiment(bert=path))
    with pytest.raises(UserError, match="config.init.swin is '.*', which holds weights of kind 'bert'"):
        start(variables, experiment(swin=path))
    with pytest.raises(UserError, match="did not write .*; convert weights with it first"):
        start(variables, experiment(swin=str(tmp_path)))
    with pytest.raises(UserError, match="config.init has both a magnet and a lavt"):
        start(variables, experiment(magnet="a", lavt="b"))
    with pytest.raises(UserError, match="config.init.lavt does not fit config.model.name 'magnet'"):
        start(variables, experiment(lavt="a"))


def test_a_whole_network_brings_its_sizes(tmp_path):
    out = imported("magnet", tmp_path)
    config = debug.get_config()
    config.init.magnet = out
    config.model.swin.drop_path = 0.25
    changed, lines = with_imported_sizes(config)
    assert config.model.swin.embed_dim == 8
    assert changed.model.swin.to_dict() == SWIN | {"drop_path": 0.25, "attention": "auto"}
    assert changed.model.language_fusion == "released"
    assert changed.model.bert.vocab_size == 20
    assert changed.model.mask_predictor.to_dict() == MAGNET["mask_predictor"]
    assert f"config.model.language_fusion is released, as in '{out}'" in lines
    assert with_imported_sizes(changed)[1] == []


def test_nothing_chosen_changes_nothing():
    variables = variables_of("lavt")
    found, lines = start(variables, experiment("lavt"))
    assert lines == []
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found))


def test_what_shapes_do_not_tell_is_compared(tmp_path):
    config = experiment(bert=imported("bert", tmp_path))
    config.model.bert.heads = 2
    with pytest.raises(UserError, match="does not fit: config.model.bert.heads is 2 here and 1 there"):
        start(variables_of("magnet"), config)
    config.model.bert.heads = 1
    config.model.bert.splits = (2, 2, 3, 4)  # Where a network interrupts it is its own matter.
    start(variables_of("magnet"), config)


def test_a_whole_network_makes_encoders_unnecessary(tmp_path):
    config = experiment(magnet=imported("magnet", tmp_path), swin="nothing", bert="nothing")
    assert len(start(variables_of("magnet"), config)[1]) == 2


def test_a_run_remembers_the_sizes_it_started_with(tmp_path):
    config = debug.get_config()
    config.init.magnet = imported("magnet", tmp_path)
    own, _ = with_imported_sizes(config)
    (tmp_path / "magnet" / "config.json").unlink()
    assert with_imported_sizes(config, own)[0].model == own.model
    config.init.magnet = str(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="convert weights with it first"):
        with_imported_sizes(config, own)
