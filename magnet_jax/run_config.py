"""The configuration of a run, as a file for `--config`: `--config=magnet_jax/run_config.py:DIR`."""

from ml_collections import ConfigDict

from magnet_jax.workdir import load_config


def get_config(workdir: str) -> ConfigDict:
    """Of the run in a directory; raises UserError where there is none."""
    return load_config(workdir)
