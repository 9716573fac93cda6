"""Experiments by the path of their file, for commands that are not `main.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from magnet_jax.errors import UserError


def load_experiment(path: str) -> ModuleType:
    """The module of a file like those of `configs/`, with its `get_config`; raises UserError where there is none."""
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise UserError(f"--config is '{path}'; expected a Python file like configs/common.py")
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config is '{path}', which has no get_config; see configs/common.py")
    return module
