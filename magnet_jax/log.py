"""What a run says: console lines, TensorBoard, and the history file."""

import time
from pathlib import Path

import numpy as np
from clu import metric_writers

from magnet_jax.workdir import History

# Short names on the console; anything else is shown by its own.
_SHOWN = {"loss": "loss", "grad_norm": "grad norm", "learning_rate": "lr"}


class Log:
    """Writes train and evaluation figures; silent on every process but the first.

    Args: active: whether this is the process that speaks; images_per_step: the global batch size.
    """

    def __init__(
        self, workdir: str | Path, start_step: int, total_steps: int, images_per_step: int, active: bool
    ):
        self.active, self.total_steps, self.images_per_step = active, total_steps, images_per_step
        self._mark = (time.perf_counter(), start_step)
        if active:
            self.history = History(workdir)
            self.history.truncate(start_step)
            self._board = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))

    def say(self, *lines: str) -> None:
        """Prints lines."""
        if self.active:
            for line in lines:
                print(line, flush=True)

    def start_clock(self, step: int) -> None:
        """Speed is measured from here: after compiling, an evaluation, a checkpoint."""
        self._mark = (time.perf_counter(), step)

    def train(self, step: int, metrics: dict[str, float]) -> None:
        """One line of progress: speed, time left, learning rate and every loss term (means since the last line,
        or the last checkpoint)."""
        now = time.perf_counter()
        seconds, steps = max(now - self._mark[0], 1e-9), step - self._mark[1]
        self._mark = (now, step)
        rate = steps / seconds
        speed = {}
        if steps:
            left = f"{duration((self.total_steps - step) / rate):>7}"
            speed = {"steps_per_second": rate, "images_per_second": rate * self.images_per_step}
        metrics = dict(sorted(metrics.items(), key=lambda item: (not item[0].startswith("loss"), item[0])))
        terms = "  ".join(
            f"{_SHOWN.get(k, k.removeprefix('loss/'))} {_number(v)}" for k, v in metrics.items()
        )
        pace = (
            f"{rate:6.2f} steps/s {rate * self.images_per_step:6.0f} images/s {left} left  " if steps else ""
        )
        self.say(f"step {step:>6}/{self.total_steps}  {pace}{terms}")
        self._record(step, {"train/" + name: value for name, value in (metrics | speed).items()})

    def evaluation(self, step: int, split: str, results: dict, best: bool = False) -> None:
        """One line per evaluated split, e.g. `step 500  val  squash oIoU 31.2 mIoU 33.0 | ...`."""
        parts = []
        for protocol, figures in results.items():
            if protocol == "left_out":
                parts.append(f"{figures['count']} examples left out")
            elif protocol != "shuffled_text":
                shown = [
                    f"{k} {_number(v)}" for k, v in figures.items() if k in ("oIoU", "mIoU", "gIoU", "cIoU")
                ]
                parts.append(f"{protocol.replace('_', ' ')} {' '.join(shown)}")
        if "shuffled_text" in results:
            floor = next(iter(results["shuffled_text"].items()))
            parts.append(
                f"shuffled sentences ({floor[0]}) {next(iter(floor[1]))} {_number(next(iter(floor[1].values())))}"
            )
        self.say(
            f"step {step:>6}/{self.total_steps}  {split}: {' | '.join(parts)}{'  (best so far)' if best else ''}"
        )
        self._record(step, {f"{split}/{name}": value for name, value in flatten(results).items()})

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Pictures [H, W, 3] uint8 for TensorBoard."""
        if self.active:
            self._board.write_images(step, {name: image[None] for name, image in images.items()})

    def close(self) -> None:
        """Flushes TensorBoard's files."""
        if self.active:
            self._board.close()

    def _record(self, step: int, scalars: dict[str, float]) -> None:
        if self.active:
            self.history.append({"step": step, **scalars})
            self._board.write_scalars(step, scalars)


def flatten(results: dict, prefix: str = "") -> dict[str, float]:
    """Nested figures as `protocol/oIoU: value`; figures that do not exist (None) are left out."""
    flat = {}
    for name, value in results.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float) -> str:
    return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:.4g}"
