"""Command line of magnet-jax: flags only, one function per mode.

python main.py --config=configs/shapes.py --workdir=DIR [--config.a.b=value ...]
python main.py --mode=eval --workdir=DIR [--config.a.b=value ...]
python main.py --mode=predict --workdir=DIR --image=FILE --text="the red ring" --output=out.png
python main.py --mode=predict --workdir=DIR --input=list.jsonl --output=FOLDER
python main.py --mode=explain --workdir=DIR --image=FILE --text="the red ring" --output=words.png
python main.py --mode=demo --workdir=DIR [--port=7860]
python main.py --mode=export --workdir=DIR --format=released --output=out.safetensors
python main.py --mode=export --workdir=DIR --format=portable --output=FOLDER
python main.py --mode=compile --config=configs/refcoco.py --topology=v5e:4x4,h100:8 [--output=report.json]
python main.py --mode=benchmark --config=configs/refcoco.py --workdir=DIR [--step=train]
"""

import contextlib
import gc
import os
import sys

if __name__ == "__main__":
    from magnet_jax.host_memory import start_with_huge_pages

    start_with_huge_pages()
    # Tracing a network makes a million objects that stay; to look through them as often as Python does by itself takes a
    # fifth of that time.
    gc.set_threshold(100_000, 20, 20)

# TensorFlow only reads data here; its start-up notes say nothing.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from magnet_jax import run_config
from magnet_jax.errors import UserError, config_error
from magnet_jax.workdir import is_run, load_config

MODES = ("train", "eval", "predict", "explain", "demo", "export", "compile", "benchmark")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, e.g. configs/shapes.py; needed to train."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, figures, pictures.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_IMAGE = flags.DEFINE_string("image", None, "Picture to look at.")
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "Many pictures for predict: a .jsonl file with image and text in each line, or a folder and --text.",
)
_TEXT = flags.DEFINE_multi_string(
    "text", [], "Sentence; repeat the flag or separate by new lines for several."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "What is written: by predict a .png (with --input a folder), explain a .png, export a .safetensors, .pth or folder, "
    "compile a .json.",
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Where demo listens; 0.0.0.0 lets other machines in.")
_PORT = flags.DEFINE_integer("port", 7860, "Port of demo.", lower_bound=1, upper_bound=65535)
_FORMAT = flags.DEFINE_string(
    "format", "released", "What export writes: the published layout, or a portable folder."
)
_TOPOLOGY = flags.DEFINE_list(
    "topology",
    [],
    "Hardware to compile for, which need not be here: v5e:4x4, v5p:8x8x16, v6e:2x4, h100:8, cpu:8.",
)
_QUICK = flags.DEFINE_bool(
    "quick",
    False,
    "Compile with less optimisation and without schedules: for memory and traffic, not for time.",
)
_STEP = flags.DEFINE_enum(
    "step",
    None,
    ("train", "gradient", "eval"),
    "What to compile (train where nothing is said) or to time (all three): eval is a forward pass, gradient forward and "
    "backward of all losses, train both and the optimizer.",
)
_REPETITIONS = flags.DEFINE_integer("repetitions", 10, "How often benchmark runs each step.", lower_bound=1)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes of a run, which JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID or the cluster "
    "(TPU pod, GKE, Slurm, MPI) tell which it is. The next three flags say so outright.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of several processes: address of process 0, host:port."
)
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many processes there are.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "Which of them this is, from 0.")
_PATIENCE = flags.DEFINE_float("patience", 300.0, "Seconds to wait until all processes have started.")


def main(_) -> None:
    """Starts JAX as the configuration says and runs one mode; exits 1 with one line for a mistake of the user."""
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(
        lambda record: "orbax" not in record.pathname
    )  # It narrates every save.
    from input_pipeline.records import DataError

    try:
        run(_CONFIG.value)
    except (UserError, DataError) as error:
        fail(1, str(error))
    except OSError as error:
        what = f"{error.strerror}: '{error.filename}'" if error.strerror and error.filename else str(error)
        fail(1, f"{what}; give a path that exists and can be written, on a disk with room")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(
            1,
            "out of memory; split the batch (config.train.accumulate=2 or more) or lower config.data.batch_size, compute "
            "again instead of keeping (config.model.remat=('decoder','stage_1')), compute in config.model.dtype='bfloat16', "
            f"or split the parameters (config.sharding=(('.*','fsdp'),)) ({str(error).splitlines()[0]})",
        )


def run(config) -> None:
    """Hands over to the function of the mode."""
    from magnet_jax.host_memory import compute_in_main_thread, keep_freed_memory

    needed = {} if _MODE.value == "compile" else {"workdir": _WORKDIR.value}
    needed |= {
        "train": {"config": config},
        "predict": {"output": _OUTPUT.value} if _INPUT.value else {"image": _IMAGE.value},
        "explain": {"image": _IMAGE.value},
        "export": {"output": _OUTPUT.value},
        "compile": {"config": config, "topology": _TOPOLOGY.value},
        "benchmark": {"config": config},
    }.get(_MODE.value, {})
    for name, value in needed.items():
        if not value:
            raise UserError(f"--{name} is missing; --mode={_MODE.value} needs it")
    if _MODE.value == "compile":
        from magnet_jax import hardware

        hardware.prepare(_TOPOLOGY.value)
        from magnet_jax.compile import compile_all

        compile_all(config, _TOPOLOGY.value, _STEP.value or "train", _OUTPUT.value, _QUICK.value)
        return
    config = load_config(_WORKDIR.value) if config is None else config
    several = _DISTRIBUTED.value or any(
        flag.value is not None for flag in (_COORDINATOR, _PROCESS_COUNT, _PROCESS_INDEX)
    )
    if several and _MODE.value not in ("train", "eval"):
        raise UserError(
            f"--mode={_MODE.value} runs in one process; leave --distributed and its companions away"
        )
    one_device = config.cpu_devices == 1 and not several
    if one_device:
        compute_in_main_thread()
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if one_device:
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if several:
            from magnet_jax.processes import end_on_sigterm, find_place, joined

            place = find_place(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value)
            stack.enter_context(joined(place, _PATIENCE.value))
            if _MODE.value == "eval":  # Has nothing to save.
                end_on_sigterm()
        run_mode(config)


def run_mode(config) -> None:
    """Runs a mode that needs devices."""
    from magnet_jax.compile_cache import keep_compiled

    if is_run(_WORKDIR.value):
        keep_compiled(_WORKDIR.value)
    if _MODE.value == "train":
        from magnet_jax.train import train

        train(config, _WORKDIR.value)
    elif _MODE.value == "eval":
        from magnet_jax.evaluate import evaluate

        evaluate(_WORKDIR.value, config)
    elif _MODE.value == "export":
        from magnet_jax.export import export

        export(_WORKDIR.value, _OUTPUT.value, _FORMAT.value, config)
    elif _MODE.value == "demo":
        from magnet_jax.demo import demo

        demo(_WORKDIR.value, _HOST.value, _PORT.value, config)
    elif _MODE.value == "benchmark":
        from magnet_jax.benchmark import benchmark
        from magnet_jax.programs import STEPS

        benchmark(config, _WORKDIR.value, (_STEP.value,) if _STEP.value else STEPS, _REPETITIONS.value)
    else:
        from magnet_jax.explain import explain
        from magnet_jax.predict import predict

        texts = [line for text in _TEXT.value for line in text.splitlines() or [""]]
        if _INPUT.value and _MODE.value == "predict":
            from magnet_jax.predict_many import predict_many

            if failed := predict_many(_WORKDIR.value, _INPUT.value, texts, _OUTPUT.value, config):
                fail(
                    1,
                    f"{failed} of the pictures have no prediction, see the warnings; the others are written",
                )
            return
        ask = explain if _MODE.value == "explain" else predict
        ask(_WORKDIR.value, _IMAGE.value, texts, _OUTPUT.value or "out.png", config)


def parse(argv: list[str]) -> list[str]:
    """absl's flag parser; anything wrong with a flag or a configuration field is one line and exit code 2."""
    try:
        rest = flags.FLAGS(with_run(argv))
        getattr(_CONFIG.value, "seed", None)  # A configuration that did not load raises at its first use.
    except (flags.Error, UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        fail(2, config_error(error))
    if rest[1:]:
        fail(2, f"'{rest[1]}' is not a flag; expected --name=value")
    return rest


def with_run(argv: list[str]) -> list[str]:
    """Where fields are changed but no --config is given, they are those of the run in --workdir."""
    names = [word.lstrip("-").partition("=")[0] for word in argv[1:] if word.startswith("-")]
    if "config" in names or not any(name.startswith("config.") for name in names):
        return argv
    folders = [word.partition("=")[2] for word in argv if word.lstrip("-").startswith("workdir=")]
    if not folders or not is_run(folders[-1]):
        fail(
            2,
            "--config is missing, and --workdir holds no run; fields are changed of the configuration of either",
        )
    return [argv[0], f"--config={run_config.__file__}:{folders[-1]}", *argv[1:]]


def fail(code: int, line: str) -> None:
    """Ends the program with one line on stderr, at once: threads of a save that failed would go on to say the same."""
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
