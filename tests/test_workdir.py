"""Run directories: what several processes see, and those of earlier versions."""

import threading

import pytest

from configs import debug
from magnet_jax.errors import UserError
from magnet_jax.workdir import check_same_config, load_config, wait_for_run, write_json


def test_a_run_that_appears_late_is_waited_for(tmp_path):
    threading.Timer(0.7, lambda: (tmp_path / "config.json").write_text("{}")).start()
    wait_for_run(tmp_path)


def test_a_run_on_another_disk_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"is not what process 0 has there; give a --workdir on a disk that all"
    ):
        wait_for_run(tmp_path, patience=0.1)


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    config = debug.get_config()
    fields = config.to_dict()
    fields["model"]["swin"]["blocks"] = fields["model"].pop("layers")
    write_json(tmp_path / "config.json", fields)
    assert load_config(tmp_path).to_dict() == config.to_dict()
    check_same_config(tmp_path, config)
