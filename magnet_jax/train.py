"""Training: one function, read from top to bottom."""

import contextlib
import functools
import math
import signal
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import Augmentation, Loader, Tokenizer
from magnet_jax import visualize
from magnet_jax import workdir as run_files
from magnet_jax.checkpoint import Checkpointer, has_variables
from magnet_jax.compile_cache import keep_compiled
from magnet_jax.errors import UserError
from magnet_jax.evaluate import Evaluator, check_batch_size, csv_path
from magnet_jax.initial import fill, load_initial
from magnet_jax.log import Log, flatten
from magnet_jax.network import build_network
from magnet_jax.optim import make_optimizer
from magnet_jax.parallelism import jit_eval_step, jit_init, make_parallelism
from magnet_jax.processes import end_on_sigterm
from magnet_jax.sharding import make_mesh, state_sharding
from magnet_jax.table import table
from magnet_jax.train_step import configured_train_step, init_state
from magnet_jax.trained import batch_shapes, prepare


def train(config: ConfigDict, workdir: str) -> dict:
    """Trains, or goes on where an earlier run in `workdir` stopped, then evaluates; returns the results.

    A run that was stopped anywhere and started again ends with the same parameters, bit for bit, as one that was not.
    Raises UserError for a configuration that cannot work or is not that of `workdir`, and for a loss that is not finite.
    """
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed is {config.seed}; expected 0 to {2**32 - 1}")
    # ------------------------------------------------------------------------------------------------ run directory
    workdir = Path(workdir)
    if has_variables(workdir):
        raise UserError(
            f"'{workdir}' holds an exported network, which is not trained on; give another --workdir"
        )
    first_process = jax.process_index() == 0
    own = run_files.load_config(workdir) if run_files.is_run(workdir) else None
    wait_for_all("looked for a run")  # Before the first process makes one.
    config, tokenizer, changes = prepare(config, own)
    if own is not None:
        if config.data.has_absent is None:  # Looked for below, when the run began.
            config.data.has_absent = own.data.get("has_absent")
        run_files.check_same_config(workdir, config)
        check_same_words(workdir, tokenizer)
    mesh = make_mesh(config.mesh)
    check_batch_size("data", config, mesh)
    check_batch_size("eval", config, mesh)
    parallelism = make_parallelism(config, mesh)
    network = build_network(config)  # Before the data, which may take long: what is wrong is said at once.

    # --------------------------------------------------------------------------------------------------------- data
    check_splits(config)
    records = input_pipeline.load_split(config.data, config.data.split)
    if config.data.has_absent is None:
        config.data.has_absent = records.has_absent
    loader = Loader(
        records,
        tokenizer,
        batch_size=config.data.batch_size,
        image_size=(config.data.image_size, config.data.image_size),
        seed=config.seed,
        train=True,
        sentences=config.data.sentences,
        augmentation=Augmentation(**config.data.augment.to_dict()),
        max_bad_share=config.data.max_bad_share,
        share=parallelism.rows(config.data.batch_size),
        prefetch=config.data.prefetch,
        workers=config.data.workers,
    )
    total_steps = config.train.steps or int(config.train.epochs * loader.steps_per_epoch)

    # ------------------------------------------------------------------------------------------------ network's state
    tx, schedule = make_optimizer(config.optimizer, total_steps)
    # The seed is an argument: of all seeds the program is one, which is compiled once.
    init = functools.partial(init_state, network, tx, batch=batch_shapes(config), ema=bool(config.train.ema))
    seed = np.uint32(config.seed)
    shapes = jax.eval_shape(init, seed)  # Nothing is ever whole on one device.
    shardings = state_sharding(shapes, mesh, config.sharding)

    step_function = configured_train_step(config, network, tx, schedule, **parallelism.within_step)
    evaluator = Evaluator(jit_eval_step(network, shardings.variables, mesh), tokenizer, config, mesh)
    check_best_metric(config, evaluator.figure_names())

    arrays, loaded = load_initial(shapes.variables, config) if own is None else ({}, [])

    # Only now, when nothing in the configuration was refused; config.json last, since it says that here is a run.
    workdir.mkdir(parents=True, exist_ok=True)
    if first_process and own is None:
        tokenizer.save(workdir / "tokenizer")
        run_files.save_config(workdir, config)
    wait_for_all("made a run")
    run_files.wait_for_run(workdir)
    keep_compiled(workdir)

    checkpointer = Checkpointer(workdir, config.checkpoint.keep, score_of=score_name(config))
    start_step = checkpointer.latest_step() or 0
    log = Log(workdir, start_step, total_steps, config.data.batch_size, active=first_process)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    log.say(
        f"{len(records)} expressions, {total_steps} steps of {config.data.batch_size}, {parameters / 1e6:.2f} M parameters, "
        f"{mesh.size} {jax.devices()[0].platform} device(s) in {jax.process_count()} process(es)"
    )
    if start_step:
        log.say(f"going on from the checkpoint of step {start_step}")
        state, _ = checkpointer.restore(shapes, shardings)
    if start_step < total_steps:
        log.say("compiling the train step (some 10 s to some minutes, by size) ...")
    with ThreadPoolExecutor() as pool:  # The step and the initial state compile side by side.
        if start_step < total_steps:
            compiled = pool.submit(
                parallelism.compile, step_function, shapes, shardings, batch_shapes(config)
            )
        if not start_step:
            state = jit_init(init, shardings, mesh)(seed)
            if own is not None:  # Stopped before its first checkpoint.
                arrays, loaded = load_initial(shapes.variables, config)
            if arrays:
                state = state.replace(**fill(state.variables, arrays))
                state = (
                    state if state.ema is None else state.replace(ema=jax.tree.map(jnp.copy, state.params))
                )
            log.say(*changes, *loaded)
    if start_step < total_steps:
        train_step = compiled.result()
    state = parallelism.to_own(state)

    # ---------------------------------------------------------------------------------------------------- the loop
    loader.start_step = start_step
    best = checkpointer.best_score()
    stop = _StopSignal()
    unread = []  # Metrics of the steps since the last log line or checkpoint, still on the device.
    left_out = 0.0  # Examples since the last log line; means begin anew at a checkpoint, as in a run that goes on from it.

    def read_metrics() -> dict[str, float]:
        """Means since the last reading (the last learning rate), after making sure that every step's were finite."""
        rows = jax.device_get(unread)
        unread.clear()
        for step, row in rows:
            bad = [name for name, value in row.items() if not np.isfinite(value)]
            if bad:
                checkpointer.wait()
                good = checkpointer.latest_step()
                raise UserError(
                    f"training diverged: {', '.join(bad)} not finite at step {step}; last good checkpoint: "
                    f"{'none' if good is None else f'step {good}'} in '{checkpointer.directory}'; "
                    "lower config.optimizer.learning_rate or config.optimizer.clip_norm"
                )
        if not rows:
            return {"left_out": 0.0}
        means = {name: float(np.mean([row[name] for _, row in rows])) for name in rows[0][1]}
        means["left_out"] = sum(float(row["left_out"]) for _, row in rows)  # A number, not a mean.
        return means | {"learning_rate": float(rows[-1][1]["learning_rate"])}

    def save(step: int, score: float | None = None) -> None:
        checkpointer.save(
            step,
            parallelism.to_global(state),
            {"config": config.to_json(), "examples_seen": step * config.data.batch_size},
            score,
        )

    with stop, contextlib.closing(iter(loader)) as host_batches:
        batches = parallelism.batches(host_batches, config.data.batch_size)
        for step in range(start_step + 1, total_steps + 1):
            state, metrics = train_step(state, next(batches))
            unread.append((step, metrics))

            if step == start_step + 1 and step < total_steps:  # Compiling is no part of the speed.
                jax.block_until_ready(metrics)
                log.start_clock(step)
            if step in (1, total_steps) or step % config.train.log_every == 0:
                means = read_metrics()
                left_out, means["left_out"] = 0.0, left_out + means["left_out"]
                if not means["left_out"]:  # Only where there is something to say.
                    del means["left_out"]
                log.train(step, means)

            score = None
            every = config.train.eval_every
            # The last step, whose own evaluation follows, is a candidate for the best, too.
            if every and (step % every == 0 or step == total_steps):
                results, pictures = evaluator(
                    parallelism.to_global(state).variables,
                    config.data.monitor_split,
                    config.eval.monitor_examples,
                    config.eval.panels * (step < total_steps),
                )
                score = best_score(results, config)
                if step < total_steps:
                    log.evaluation(step, config.data.monitor_split, results, best=score > best)
                    write_panels(log, workdir, step, config.data.monitor_split, pictures)

            stopping = stop.asked(step)
            improved = score is not None and score > best
            if improved or stopping or step % config.checkpoint.every_steps == 0 or step == total_steps:
                left_out += read_metrics()["left_out"]
                save(step, score)
                best = max(best, score) if score is not None else best
            if improved or stopping or score is not None:
                log.start_clock(step)
            if stopping and step < total_steps:
                checkpointer.wait()
                log.say(f"stopped at step {step} and saved; the same command goes on from there")
                log.close()
                return {}

    # --------------------------------------------------------------------------------------------- final evaluation
    checkpointer.wait()
    if jax.process_count() > 1:
        end_on_sigterm()  # All is saved.
    variables, results = parallelism.to_global(state).variables, {}
    for split in config.data.eval_splits:
        results[split], pictures = evaluator(
            variables, split, config.eval.examples, config.eval.panels, csv_path(workdir, split, config)
        )
        log.evaluation(total_steps, split, results[split])
        write_panels(log, workdir, total_steps, split, pictures)
    if first_process:
        run_files.write_json(workdir / "results.json", results)
        pictured = visualize.curves(
            log.history.read(), config.data.monitor_split, config.checkpoint.best_metric
        )
        run_files.write_atomically(workdir / "curves.png", pictured)
    log.say(table(results))
    log.say(f"results in '{workdir / 'results.json'}', curves in '{workdir / 'curves.png'}'")
    log.close()
    checkpointer.close()
    return results


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here; nothing to do for one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same_words(workdir: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError where the numbers of a run's words would now mean other words."""
    learnt = Tokenizer(str(workdir / "tokenizer"), tokenizer.max_length).vocab
    if any(learnt.get(piece) != number for piece, number in tokenizer.vocab.items()):
        raise UserError(
            f"config.data.vocab is another vocabulary than '{workdir / 'tokenizer'}', which the run knows; give that one"
        )


def check_splits(config: ConfigDict) -> None:
    """Raises UserError for a split to evaluate that the data have not, which would else show hours later."""
    data = config.data
    there = input_pipeline.splits(data.source, root=data.root, **data.options.to_dict())
    for field, names in (("eval_splits", data.eval_splits), ("monitor_split", (data.monitor_split,))):
        for name in names:
            if name not in there:
                raise UserError(f"config.data.{field} has '{name}'; the data have {', '.join(there)}")


def check_best_metric(config: ConfigDict, figures: Collection[str]) -> None:
    """Raises UserError where the figure that chooses the best checkpoint is not one of `figures`."""
    if config.checkpoint.best_metric not in figures:
        raise UserError(
            f"config.checkpoint.best_metric is '{config.checkpoint.best_metric}'; expected one of "
            f"{', '.join(name for name in figures if name.count('/') == 1)}"
        )


def best_score(results: dict, config: ConfigDict) -> float:
    """The figure that chooses the best checkpoint; raises UserError where the split has none of it."""
    figures = flatten(results)
    check_best_metric(config, figures)
    return figures[config.checkpoint.best_metric]


def score_name(config: ConfigDict) -> str:
    """What `best_score` measures: scores of something else are not compared with it."""
    return f"{config.checkpoint.best_metric} on {config.eval.monitor_examples} of {config.data.monitor_split}"


def write_panels(log: Log, workdir: Path, step: int, split: str, pictures: list) -> None:
    """Pictures into `panels/step_N/`, one by one and on one sheet, and into TensorBoard."""
    if not log.active or not pictures:
        return
    images = {
        f"{split}_{i}": visualize.panel(p.image, p.text, p.truth, {"prediction": p.prediction})
        for i, p in enumerate(pictures)
    }
    for name, image in images.items():
        run_files.write_atomically(
            workdir / "panels" / f"step_{step}" / f"{name}.png", visualize.encode_png(image)
        )
    everything = visualize.sheet(list(images.values()))
    run_files.write_atomically(
        workdir / "panels" / f"step_{step}" / f"{split}.png", visualize.encode_png(everything)
    )
    log.images(step, {f"panels/{name}": image for name, image in images.items()})


class _StopSignal:
    """Catches SIGTERM, so that a run ends at a step boundary with a checkpoint.

    Of several processes any may be told, and all stop at the same step: that JAX does, with a handler of its own.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._several = jax.process_count() > 1
        self._catches = not self._several and threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self._catches:
            self._former = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_):
        if self._catches:
            signal.signal(signal.SIGTERM, self._former)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every process."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()
