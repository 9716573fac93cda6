"""A small LAVT trained, stopped, resumed, exported, imported and evaluated again: nothing changes on the way."""

import json
import signal

import numpy as np
import pytest
import safetensors.numpy

from configs import debug
from configs.lavt_refcoco import use_lavt
from magnet_jax import pretrained
from magnet_jax import train as train_module
from magnet_jax.errors import UserError
from magnet_jax.evaluate import evaluate
from magnet_jax.export import differences, export
from magnet_jax.initial import read_arrays
from magnet_jax.log import Log
from magnet_jax.predict import Predictor
from magnet_jax.trained import load_trained
from magnet_jax.weight_names import flat_variables
from tests.test_initial import experiment


def config():
    c = debug.get_config()
    use_lavt(c)
    c.loss.grounding = 1.0
    c.train.steps, c.train.eval_every, c.checkpoint.every_steps = 4, 0, 2
    c.eval.panels = 0
    return c


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_module.train(config(), workdir)


def arrays_of(workdir, config=None):
    """The model's arrays by our name."""
    variables = load_trained(workdir, config).variables
    of_model = {"params": variables["params"]["model"], "batch_stats": variables["batch_stats"]}
    return {name: np.asarray(x) for name, x in flat_variables(of_model).items()}


def assert_same_arrays(a, b):
    assert set(a) == set(b)
    for name, x in a.items():
        assert x.dtype == b[name].dtype
        assert x.tobytes() == b[name].tobytes(), name


def test_a_stopped_run_ends_with_the_same_statistics_and_parameters(run, tmp_path):
    steps = []

    def stop_at_two(self, step, metrics):
        steps.append(step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "train", stop_at_two)
        c = config()
        c.train.log_every = 1
        assert train_module.train(c, tmp_path) == {}
    assert max(steps) == 2
    train_module.train(config(), tmp_path)
    whole = arrays_of(run[0])
    assert any(name.startswith("batch_stats/") and np.any(x) for name, x in whole.items())
    assert_same_arrays(whole, arrays_of(tmp_path))


@pytest.fixture(scope="module")
def imported(run, tmp_path_factory):
    """The run exported to the published layout, and imported from there."""
    folder = tmp_path_factory.mktemp("export")
    export(run[0], folder / "new" / "lavt.safetensors", "released")
    pretrained.import_weights("lavt_one", folder / "new" / "lavt.safetensors", folder / "imported")
    return folder


def test_importing_an_export_gives_the_same_bits(run, imported):
    assert_same_arrays(arrays_of(run[0]), read_arrays(imported / "imported", "lavt"))


def test_an_export_has_what_pytorch_keeps_beside_the_parameters(imported):
    arrays = safetensors.numpy.load_file(imported / "new" / "lavt.safetensors")
    index = arrays["backbone.layers.1.blocks.0.attn.relative_position_index"]
    assert index.dtype == np.int64
    assert index.shape == (16, 16)
    # From the corner to itself, to its right neighbour, and from the last pixel to the first.
    assert (index[0, 0], index[0, 1], index[15, 0]) == (24, 23, 48)
    assert arrays["classifier.bn2_3.num_batches_tracked"].shape == ()
    assert arrays["classifier.conv1_4.weight"].shape == (32, 96, 3, 3)
    assert arrays["text_encoder.embeddings.word_embeddings.weight"].shape[1] == 16


def test_imported_weights_evaluate_and_predict_without_a_training(run, imported, tmp_path, capsys):
    workdir, results = run
    c = config()
    c.model.swin.embed_dim = 12  # The weights bring their own sizes along.
    c.init.lavt = str(imported / "imported")
    found = evaluate(str(tmp_path / "eval"), c)
    assert json.dumps(found) == json.dumps(results)
    printed = capsys.readouterr().out
    assert f"config.model.swin.embed_dim is 8, as in '{c.init.lavt}'" in printed
    assert "newly initialised, in whole or in part: nothing" in printed
    assert json.loads((tmp_path / "eval" / "results.json").read_text()) == results
    image = np.full((40, 50, 3), 90, np.uint8)
    from PIL import Image

    ours, theirs = (
        Predictor.from_pretrained(w, x).predict(Image.fromarray(image), ["the red ring"])[0].logits
        for w, x in ((workdir, None), (tmp_path / "none", c))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_imported_weights_are_not_mistaken_for_those_of_a_run(run, imported):
    c = config()
    c.init.lavt = str(imported / "imported")
    with pytest.raises(UserError, match="holds a run that did not start from config.init.lavt"):
        evaluate(str(run[0]), c)


@pytest.mark.slow
def test_training_starts_from_imported_weights(imported, tmp_path, capsys):
    c = config()
    c.init.lavt = str(imported / "imported")
    c.optimizer.learning_rate = 0.0
    train_module.train(c, tmp_path)
    assert "newly initialised, in whole or in part: grounding" in capsys.readouterr().out
    start = read_arrays(imported / "imported", "lavt")
    end = arrays_of(tmp_path)
    assert_same_arrays(
        *(
            {name: x for name, x in arrays.items() if not name.startswith("batch_stats")}
            for arrays in (start, end)
        )
    )


def test_a_vocabulary_that_the_weights_do_not_know_is_refused(imported, tmp_path):
    c = config()
    c.init.lavt = str(imported / "imported")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "ring"])
    )
    c.data.vocab = str(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="with 7 words, but the weights of config.init.lavt know 81"):
        evaluate(str(tmp_path / "eval"), c)
    assert not (tmp_path / "eval").exists()


def test_pytorch_gets_its_two_dictionaries(run, tmp_path):
    torch = pytest.importorskip("torch")
    export(run[0], tmp_path / "lavt.pth", "released")
    content = torch.load(tmp_path / "lavt.pth", weights_only=True)
    assert set(content) == {"model", "bert_model", "magnet_jax"}
    assert content["model"]["backbone.norm0.bias"].shape == (8,)
    assert content["bert_model"]["embeddings.LayerNorm.bias"].shape == (16,)
    pretrained.import_weights("lavt", tmp_path / "lavt.pth", tmp_path / "imported")
    assert_same_arrays(arrays_of(run[0]), read_arrays(tmp_path / "imported", "lavt"))


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("x.safetensors", "onnx", "--format is 'onnx'"),
        ("x.npz", "released", "expected a name that ends in .safeten"),
    ],
)
def test_other_formats_are_refused(run, tmp_path, name, form, message):
    with pytest.raises(UserError, match=message):
        export(run[0], tmp_path / name, form)
    assert list(tmp_path.iterdir()) == []


def test_what_the_published_code_computes_otherwise_is_said():
    magnet = experiment()
    magnet.model.bert.heads = 12
    assert differences(magnet.model) == []
    magnet.model.language_fusion, magnet.model.swin.position = "masked", True
    first, second = differences(magnet.model)
    assert "config.model.language_fusion is 'masked', the published code has 'released'" in first
    assert "config.model.swin.position is True, the published code has False" in second
