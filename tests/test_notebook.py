"""The notebook, run from top to bottom with a small setting, as Colab would."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "magnet_colab.ipynb"


def test_notebook_is_stored_without_results():
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    """In a folder of its own that looks like the clone, so that nothing is written to it."""
    for name in ("main.py", "configs", "input_pipeline", "magnet_jax"):
        (tmp_path / name).symlink_to(NOTEBOOK.parents[1] / name)
    monkeypatch.setenv("MAGNET_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "results in 'runs/notebook/results.json'" in printed
    assert "skipped: the small setting downloads nothing" in printed
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4  # Curves, panels, the prediction, the words.
    for name in ("found.png", "found.mask.png", "words.png"):
        assert (tmp_path / name).exists()
