"""MagNet at its released size, 297 M parameters: imported within 4 GB, run at 480 x 480, exported bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from configs import common
from magnet_jax.pretrained import expected_shapes
from magnet_jax.weight_names import to_published

ROOT = Path(__file__).parents[1]
GB = 2**30


def run(*command):
    """Runs Python with the arguments; returns what it printed."""
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# Of the command itself: getrusage would count this process too, from which it is forked.
MEASURED = """
import re, sys
from magnet_jax import pretrained
code = pretrained.main(sys.argv[1:])
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
sys.exit(code)
"""


@pytest.mark.slow
def test_released_size(tmp_path):
    fields = common.get_config().model.to_dict()
    fields["bert"]["vocab_size"] = 30522
    shapes = expected_shapes("magnet", fields)
    rng = np.random.default_rng(0)

    def values(name, shape):
        if len(shape) == 1:
            return np.full(shape, float(name.endswith("/scale")), np.float32)
        return (rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    ours = {name: values(name, shape) for name, shape in shapes.items()}
    published = {name: np.ascontiguousarray(x) for name, x in to_published("magnet", ours).items()}
    del ours
    source, weights = tmp_path / "released.safetensors", tmp_path / "weights"
    safetensors.numpy.save_file(published, source)
    assert source.stat().st_size > 1.18e9

    printed = run("-c", MEASURED, "--kind=magnet", f"--source={source}", f"--out={weights}")
    assert int(printed.split("peak ")[1]) < 4 * GB
    assert json.loads((weights / "config.json").read_text())["model"]["bert"]["heads"] == 12

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "man", *map(str, range(30515))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)).save(tmp_path / "picture.png")
    start = ["main.py", "--config=configs/common.py", f"--workdir={tmp_path / 'none'}"]
    start += [f"--config.init.magnet={weights}", f"--config.data.vocab={tmp_path / 'vocab.txt'}"]
    files = [f"--image={tmp_path / 'picture.png'}", f"--output={tmp_path / 'out.png'}"]
    printed = run(*start, "--mode=predict", "--text=left man", *files)
    assert "newly initialised, in whole or in part: nothing" in printed
    assert Image.open(tmp_path / "out.mask.png").size == (400, 300)

    run(*start, "--mode=export", f"--output={tmp_path / 'export.safetensors'}")
    with safetensors.safe_open(tmp_path / "export.safetensors", framework="numpy") as file:
        assert {name for name in file.keys() if not name.endswith("_index")} == set(published)  # noqa: SIM118
        for name, x in published.items():
            assert file.get_tensor(name).tobytes() == x.tobytes(), name
