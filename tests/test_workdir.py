"""What several processes see of a run directory."""

import threading

import pytest

from magnet_jax.errors import UserError
from magnet_jax.workdir import wait_for_run


def test_a_run_that_appears_late_is_waited_for(tmp_path):
    threading.Timer(0.7, lambda: (tmp_path / "config.json").write_text("{}")).start()
    wait_for_run(tmp_path)


def test_a_run_on_another_disk_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"is not what process 0 has there; give a --workdir on a disk that all"
    ):
        wait_for_run(tmp_path, patience=0.1)
