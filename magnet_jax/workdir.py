"""The run directory: configuration, history, results; each file is whole or absent.

config.json  tokenizer/  checkpoints/  compiled/  metrics.jsonl  results.json  expressions/  compared/  curves.png  panels/
events.out.tfevents.*
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from magnet_jax.errors import UserError

# Fields that leave the course of the parameters alone, so that a run may go on with other values.
_FREE = ("eval.", "checkpoint.", "train.log_every", "train.eval_every", "data.workers", "data.prefetch")
_FREE += (
    "data.eval_splits",
    "data.monitor_split",
    "data.options.cache_dir",
    "data.root",
    "data.max_bad_share",
    "cpu_devices",
    "parallelism",
    "model.remat",
    "model.swin.attention",
    "model.layers",
    "model.pixel_decoder.sampling",
    "mesh",
    "sharding",
)


@contextlib.contextmanager
def replacing(path: str | Path):
    """A temporary path beside `path`, which takes its place where the block succeeds and vanishes where it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp makes files private.
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Writes a file whole or not at all; raises OSError and leaves no temporary file."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, content) -> None:
    """Writes JSON with an indent, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def save_config(workdir: str | Path, config: ConfigDict) -> None:
    """Writes `config.json`."""
    write_json(Path(workdir) / "config.json", config.to_dict())


def is_run(workdir: str | Path) -> bool:
    """Whether a directory holds a run."""
    return (Path(workdir) / "config.json").exists()


def wait_for_run(workdir: str | Path, patience: float = 60.0) -> None:
    """Returns when the run that another process has made is seen here, which network disks show late.

    Raises UserError after `patience` seconds.
    """
    end = time.monotonic() + patience
    while not is_run(workdir):
        if time.monotonic() > end:
            raise UserError(
                f"'{workdir}' is not what process 0 has there; give a --workdir on a disk that all processes share"
            )
        time.sleep(0.5)


def load_config(workdir: str | Path) -> ConfigDict:
    """The configuration of a run; raises UserError where there is none."""
    path = Path(workdir) / "config.json"
    if not is_run(workdir):
        raise UserError(
            f"no run in '{workdir}' (config.json is missing); train first or give another --workdir"
        )
    try:
        return ConfigDict(_tuples(_with_new_names(json.loads(path.read_text()))))
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON ({error}); give another --workdir") from error


def _with_new_names(fields: dict) -> dict:
    """A configuration that an earlier version of this project may have written."""
    swin = fields.get("model", {}).get("swin", {})
    if "blocks" in swin:
        fields["model"]["layers"] = swin.pop("blocks")
    return fields


def check_same_config(workdir: str | Path, config: ConfigDict) -> None:
    """Raises UserError that lists the fields where `config` would train something else than the run in `workdir`."""
    there, here = _fields(load_config(workdir)), _fields(config)
    different = [
        f"{name} is {_show(there, name)} there and {_show(here, name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not name.startswith(_FREE)
    ]
    if different:
        raise UserError(
            f"'{workdir}' holds a run of another configuration: {'; '.join(different)}; "
            "use another --workdir or the same configuration"
        )


class History:
    """`metrics.jsonl`: one JSON object per line with its step, so that curves survive a restart."""

    def __init__(self, workdir: str | Path):
        self.path = Path(workdir) / "metrics.jsonl"
        self._former = (
            set()
        )  # Lines of an earlier run; a finished one that is started again says the same once more.

    def read(self) -> list[dict]:
        """All whole lines; the last one may be torn where a run was killed."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def truncate(self, step: int) -> None:
        """Forgets what came after `step`, where a restored run goes on."""
        if self.path.exists():
            kept = [row for row in self.read() if row["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._former = {json.dumps(row) for row in kept}

    def append(self, row: dict) -> None:
        """Adds one line, unless an earlier run wrote the same."""
        line = json.dumps(row)
        if line not in self._former:
            with open(self.path, "a") as file:
                file.write(line + "\n")


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fields(config: ConfigDict) -> dict[str, object]:
    flat = {}

    def visit(prefix: str, value) -> None:
        for key, item in value.items():
            if isinstance(item, dict) and item:
                visit(f"{prefix}{key}.", item)
            else:
                flat[f"{prefix}{key}"] = item

    visit("", _tuples(json.loads(json.dumps(config.to_dict()))))
    return flat


def _show(fields: dict, name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
