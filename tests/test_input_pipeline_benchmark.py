"""The benchmark measures what it says: figures against its own inputs, never against a clock."""

import pytest

from input_pipeline import benchmark, load, splits
from input_pipeline.__main__ import main


def test_what_is_printed(capsys):
    flags = ["benchmark", "--config=configs/debug.py", "--batches=10", "--repeats=1"]
    assert main([*flags, "--config.data.batch_size=6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    bare, ours = (float(line.split(": ")[1].split()[0]) for line in lines[:2])
    share = float(lines[1].split(", ")[-1].split()[0])
    assert bare > 0
    assert share == pytest.approx(100 * ours / bare, rel=0.1)
    assert "batches of 6 at 32 px" in lines[1]
    first, last = (float(part.split(" MB")[0].split()[-1]) for part in lines[2].split(", "))
    assert 50 < first <= last


def test_rates_count_images(monkeypatch):
    """A clock that jumps a second at every look, so that the rate is the number of pictures."""
    now = iter(range(100))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(now))
    records = load("shapes", "val", scenes=2, image_size=32)
    assert benchmark.bare_rate(records, [0, 1, 1, 2, 0], (16, 16), 2) == 5


def test_the_large_tree_is_as_large_as_refcoco(tmp_path, monkeypatch):
    """Its numbers of a hundredth the size, through the reader; the real size is for the command."""
    monkeypatch.setattr(benchmark, "_REFS", {name: n // 100 for name, n in benchmark._REFS.items()})
    monkeypatch.setattr(benchmark, "_IMAGES", 200)
    monkeypatch.setattr(benchmark, "_ANNOTATIONS", 1968)
    monkeypatch.setattr(benchmark, "_SENTENCES", 1422)
    benchmark.write_large_tree(tmp_path)
    found = [load("refer", split, root=str(tmp_path)) for split in splits("refer")]
    assert [len(records.segmentations) for records in found] == [424, 38, 19, 18]
    assert sum(map(len, found)) == 1422
    sentences, seconds, memory = benchmark.start_up(tmp_path)
    assert sentences == 1422
    assert seconds > 0
    assert 50 < memory < 4000
