"""Checkpoints: saved in the background, whole or not at all, restored exactly on any number of devices.

A checkpoint has three items: `variables` (all that evaluation needs), `rest` (step, optimizer state, seed) and `meta`
(JSON: configuration, data position). Layout and formats are orbax's.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from magnet_jax.errors import UserError
from magnet_jax.sharding import path_name


class Checkpointer:
    """Saves and restores `TrainState`s under `workdir/checkpoints`; keeps the latest few and the best one.

    score_of: what scores measure; those of something else, of the same run before, are none. Empty: whatever there is.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, read_only: bool = False, score_of: str = ""):
        self.directory = (Path(workdir) / "checkpoints").absolute()
        self._score_of = score_of
        policies = [
            checkpoint_managers.LatestN(max(keep, 1)),
            checkpoint_managers.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False),
        ]
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                best_fn=self._score,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=not read_only,
                cleanup_tmp_directories=not read_only,  # What a killed run left half-written.
            ),
            item_handlers={
                "variables": ocp.StandardCheckpointHandler(),
                "rest": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def best_score(self) -> float:
        """The best score saved so far; -inf where there is none."""
        step = self._manager.best_step()
        metrics = None if step is None else self._manager.metrics(step)
        return float("-inf") if metrics is None else self._score(metrics)

    def _score(self, metrics: dict) -> float:
        other = self._score_of and metrics.get("of", self._score_of) != self._score_of
        return float("-inf") if other else metrics["score"]

    def save(self, step: int, state, meta: dict, score: float | None = None) -> None:
        """Starts saving and returns; `score` (higher is better) makes it a candidate for the best.

        Raises OSError where there is no room, and where an earlier save failed.
        """
        if step == self.latest_step():
            return
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        with _os_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(state.variables),
                    rest=ocp.args.StandardSave(_rest(state)),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if score is None else {"score": score, "of": self._score_of},
                force=True,
            )

    def wait(self) -> None:
        """Waits until everything is on disk; raises OSError where it is not."""
        with _os_errors(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, shapes, shardings):
        """The latest checkpoint as a state like `shapes`, placed by `shardings`; and its meta data."""
        step = self.latest_step()
        target = _placed(shapes, shardings)
        self._check_shapes(step, {"variables": target.variables, "rest": _rest(target)})
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardRestore(target.variables),
                rest=ocp.args.StandardRestore(_rest(target)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        fields = found.variables | found.rest
        if shapes.ema is not None:
            fields["ema"] = found.variables["params"]
        return shapes.replace(**fields), found.meta

    def restore_variables(self, shapes, shardings, which: str = "latest"):
        """The variables of the 'latest' or 'best' checkpoint and its step, for evaluation and prediction."""
        if which not in ("latest", "best"):
            raise UserError(f"config.checkpoint.load is '{which}'; expected 'latest' or 'best'")
        step = self.latest_step()
        if step is None:
            raise UserError(f"no checkpoint in '{self.directory}'; train first or give another --workdir")
        if which == "best":
            step = self._manager.best_step()
        if step is None:
            raise UserError(
                f"config.checkpoint.load is 'best', but nothing was evaluated during the training in '{self.directory}' "
                "(config.train.eval_every=0); give 'latest'"
            )
        target = _placed(shapes, shardings)
        self._check_shapes(step, {"variables": target})
        found = self._manager.restore(
            step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(target))
        )
        return found.variables, step

    def close(self) -> None:
        """Ends the background threads."""
        self._manager.close()

    def _check_room(self, needed: int) -> None:
        # Orbax on a full disk prints a traceback for each array; better not to begin. Indexes and metadata come on top.
        needed += 2**24
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            sizes = f"{needed / 1e6:.1f} MB needed for a checkpoint, {free / 1e6:.1f} MB free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({sizes})", str(self.directory))

    def _check_shapes(self, step: int, expected: dict) -> None:
        saved = self._manager.item_metadata(step)
        there, here = (
            {f"{item}/{name}": shape for item, tree in items.items() for name, shape in _shapes(tree).items()}
            for items in ({item: saved[item].tree for item in expected}, expected)
        )
        _compare(self.directory / str(step), there, here)


def _compare(path: Path, there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]) -> None:
    differences = [
        f"{name} {there.get(name, 'absent')} instead of {here.get(name, 'absent')}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise UserError(
            f"checkpoint '{path}' does not fit the configuration: {len(differences)} arrays differ: "
            f"{'; '.join(differences)}; use the configuration it was trained with or another --workdir"
        )


def save_variables(folder: Path, variables) -> None:
    """Variables alone, to `folder/params`, without the empty collections: a checkpoint keeps nothing of those."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / _PARAMS, _filled(variables))


def has_variables(folder: str | Path) -> bool:
    """Whether `save_variables` wrote to a folder."""
    return (Path(folder) / _PARAMS).is_dir()


def restore_variables(folder: str | Path, shapes, shardings):
    """What `save_variables` wrote, placed by `shardings`; raises UserError where it is not of these shapes."""
    path, target = Path(folder).absolute() / _PARAMS, _placed(shapes, shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        _compare(path, _shapes(checkpointer.metadata(path).item_metadata.tree), _shapes(_filled(target)))
        found = checkpointer.restore(path, _filled(target))
    return {name: {} for name in target} | found


_PARAMS = "params"


def _filled(variables) -> dict:
    return {name: tree for name, tree in variables.items() if jax.tree.leaves(tree)}


def _rest(state) -> dict:
    rest = {"step": state.step, "opt_state": state.opt_state, "seed": state.seed}
    # Where a running mean is kept, that is what `variables` has.
    return rest if state.ema is None else rest | {"params": state.params}


def _placed(shapes, shardings):
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def _os_errors(directory: Path):
    """Turns what orbax and tensorstore make of a failed write (ValueError and others) back into an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(
            f"could not write a checkpoint to '{directory}': {str(error).splitlines()[0]}"
        ) from error
