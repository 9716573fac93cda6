"""A grid of trainings, variants x data x seeds, and the report on it.

python -m magnet_jax.study --study=ablation --seeds=0,1,2,3,4 --out=DIR            run what is missing, then report
python -m magnet_jax.study --out=DIR --report                                      report on what is there

Every run is a process of its own and leaves `DIR/results/NAME.json`; stopped or killed, the same command goes on. Given
again while it works, on another machine that has DIR for instance, it takes runs that nobody works on. The order of
examples follows from the seed alone, so variants of one seed see the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import IO

from ml_collections import ConfigDict

from magnet_jax.errors import UserError
from magnet_jax.experiment import load_experiment


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a study."""

    experiment: str  # Path of the configuration's file.
    flavour: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.flavour.replace('/', '-')}.{self.variant}.{self.seed}"

    def config(self) -> ConfigDict:
        """The variant's, on this data, with this seed."""
        module = load_study(self.experiment)
        config = module.get_config(self.variant)
        config.update_from_flattened_dict(module.FLAVOURS[self.flavour])
        config.seed = self.seed
        return config


def load_study(path: str) -> ModuleType:
    """The module of an experiment with variants, like configs/ablation_shapes.py; raises UserError for another."""
    module = load_experiment(path)
    missing = [name for name in ("FLAVOURS", "STUDIES", "VARIANTS") if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"--config is '{path}', which has no {', '.join(missing)}; see configs/ablation_shapes.py"
        )
    return module


def config_hash(config: ConfigDict) -> str:
    """Of everything but the seed: runs of one variant are repeats of each other where it is the same."""
    fields = {name: value for name, value in config.to_dict().items() if name != "seed"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def result_file(out: Path, run: Run) -> Path:
    """Where the figures of a run are, once it has ended."""
    return out / "results" / f"{run.name}.json"


def is_done(out: Path, run: Run) -> bool:
    """Whether a run has its result; raises UserError where that is of another configuration than the run has now."""
    file = result_file(out, run)
    if not file.exists():
        return False
    there, here = json.loads(file.read_text())["config_hash"], config_hash(run.config())
    if there != here:
        raise UserError(
            f"'{file}' is of another configuration (hash {there} there, {here} here); delete it, or give another --out"
        )
    return True


def claim(out: Path, run: Run) -> IO[str] | None:
    """The right to work on a run, for as long as some process has the file open; None where another has it."""
    file = out / "runs" / f"{run.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    held = file.open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        return None
    return held


def execute_all(runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Runs what is not done, `jobs` at a time, each on cores of its own; raises UserError where one fails.

    What other processes work on is theirs, as long as they live.
    """
    from magnet_jax.log import duration

    waiting = [run for run in runs if not is_done(out, run)]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done", flush=True)
    total, start = len(waiting), time.monotonic()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[slot::jobs] for slot in range(jobs)]
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    told = False
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot in running:
                    continue
                run, held = next(((run, held) for run in waiting if (held := claim(out, run))), (None, None))
                if run is None:
                    break
                waiting.remove(run)
                with held:
                    if not is_done(out, run):  # By another process in the meantime.
                        running[slot] = run, _start(run, out, shares[slot], held)
            if waiting and not running and not told:
                names = ", ".join(run.name for run in waiting)
                print(f"waiting for other processes, which work on {names}", flush=True)
                told = True
            time.sleep(0.2)
            for slot, (run, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode:
                    log = _log_file(out, run)
                    last = (log.read_text().splitlines() or [""])[-1] if log.exists() else ""
                    raise UserError(
                        f"run {run.name} ended with exit code {process.returncode} ({last}); see '{log}', then give the "
                        "same command again"
                    )
                ended = total - len(waiting) - len(running)
                passed = time.monotonic() - start
                left = passed / ended * (total - ended)
                print(f"{run.name} done; {ended}/{total}, about {duration(left)} left", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _log_file(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.name}.log"


def _start(run: Run, out: Path, cores: Sequence[int], held: IO[str]) -> subprocess.Popen:
    from magnet_jax.compile_cache import folder_in  # JAX is not to start before a run has set its threads.

    command = [
        sys.executable,
        "-m",
        "magnet_jax.study",
        f"--out={out}",
        f"--run={json.dumps(dataclasses.asdict(run))}",
    ]
    file = _log_file(out, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if folder := folder_in(out):  # Seeds of a variant share its programs.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    with file.open("a") as log:
        return subprocess.Popen(
            [*command, f"--cores={','.join(map(str, cores))}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # The claim is the child's, and ends with it, even where the study is killed.
            pass_fds=[held.fileno()],
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 and one line on stderr where it cannot."""
    # TensorFlow only reads data here; its start-up notes say nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    parser = argparse.ArgumentParser(prog="python -m magnet_jax.study", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of runs, results and report")
    parser.add_argument("--study", default="ablation", help="which of the variants")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="separated by commas")
    parser.add_argument(
        "--config", default="configs/ablation_shapes.py", help="file with get_config(variant)"
    )
    parser.add_argument(
        "--flavours", default="", help="of the data, separated by commas; the first that the file has"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, each on its share of the cores"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, report on what is there")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # One run, in a process of its own.
    parser.add_argument("--cores", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        if arguments.run:
            if arguments.cores:
                os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
            from magnet_jax.study_run import execute

            execute(Run(**json.loads(arguments.run)), arguments.out)
            return 0
        if not arguments.report:
            # As any other end: the processes of the runs end too, each with a checkpoint.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            execute_all(_runs(arguments), arguments.out, arguments.jobs)
        from magnet_jax.study_report import write_report

        print(f"report in '{write_report(arguments.out)}'")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """Of one seed all variants before the next seed: what is there can be compared at any time."""
    module = load_study(arguments.config)
    if arguments.study not in module.STUDIES:
        raise UserError(f"--study is '{arguments.study}'; {arguments.config} has {', '.join(module.STUDIES)}")
    flavours = arguments.flavours.split(",") if arguments.flavours else [next(iter(module.FLAVOURS))]
    for flavour in flavours:
        if flavour not in module.FLAVOURS:
            raise UserError(
                f"--flavours has '{flavour}'; {arguments.config} has {', '.join(map(repr, module.FLAVOURS))}"
            )
    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}; expected 1 or more")
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds is '{arguments.seeds}'; expected numbers like 0,1,2") from error
    return [
        Run(arguments.config, flavour, variant, seed)
        for flavour in dict.fromkeys(flavours)
        for seed in dict.fromkeys(seeds)
        for variant in module.STUDIES[arguments.study]
    ]


if __name__ == "__main__":
    sys.exit(main())
