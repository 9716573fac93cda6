"""Where the time of a program goes: a profile of real runs, added up by the parts of the network."""

from __future__ import annotations

import bisect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax

from magnet_jax.hlo_text import operation_names, readers

# An operation belongs to the first part whose expression is found in its name, which the modules are in that it comes from:
# in a loop over layers those of the layer by their classes, which is all that is left of what the loop begins with.
PARTS = (
    ("Mask Grounding", r"MaskGrounding"),
    ("optimizer", r"[/(]optimizer[/)]"),
    ("losses", r"[/(]losses[/)]|TextProjection|/lang_proj"),
    ("deformable attention", r"(/decoder/layer_\d+|PixelDecoderLayer)/attn"),
    ("pixel decoder", r"/decoder/|PixelDecoderLayer/"),
    ("mask predictor", r"/predictor/|PredictorLayer/"),
    ("fusion (CAM)", r"/(image|text)_(fusion|gate|norm)"),
    ("BERT", r"/(embeddings|text)[/.]"),
    ("Swin stage 1", r"/stage_0/"),
    ("Swin stage 2", r"/stage_1/"),
    ("Swin stage 3", r"/stage_2/"),
    ("Swin stage 4", r"/stage_3/"),
    ("Swin patches", r"/(patch_embed|merge_\d)"),
)
_OTHER = "other"

Interval = tuple[float, float, str]  # Start, end, operation.


def record(folder: str | Path, run: Callable[[], None]) -> Path:
    """Profiles `run()` into a folder that TensorBoard and Perfetto read; returns the file with the events."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # It slows down what it watches.
    before = set(Path(folder).rglob("*.xplane.pb"))
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        run()
    (file,) = set(Path(folder).rglob("*.xplane.pb")) - before
    return file


def seconds_by_part(file: str | Path, hlo_text: str) -> dict[str, dict[str, float]]:
    """Seconds `{part: {"forward": s, "backward": s}}` of all runs of a program in a profile.

    hlo_text: of the compiled program. Where operations run at the same time, each has its share of it, so that the sum is
    the time in which any ran.
    """
    names = names_of_operations(hlo_text)
    events = _events(file, readers(hlo_text))
    return by_part(shares(interval for interval in events if interval[2] in names), names)


def by_part(seconds: Mapping[str, float], names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Adds up seconds of operations, whose names are given: `{part: {"forward": s, "backward": s}}`."""
    found: dict[str, dict[str, float]] = {}
    for operation, duration in seconds.items():
        name = names.get(operation, "")
        row = found.setdefault(part_of(name), {"forward": 0.0, "backward": 0.0})
        row["backward" if "transpose(" in name else "forward"] += (
            duration  # Gradients flow through the former.
        )
    order = [part for part, _ in PARTS] + [_OTHER]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def names_of_operations(hlo_text: str) -> dict[str, str]:
    """The name in the network of every operation of a compiled program: of its names the first that belongs to a part."""
    return {operation: _name(candidates) for operation, candidates in operation_names(hlo_text).items()}


def part_of(name: str) -> str:
    """The part that an operation of that name belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), _OTHER)


def _name(candidates: list[str]) -> str:
    """The first name that belongs to a part; where there is none, the operation's own."""
    return next((name for name in candidates if part_of(name) != _OTHER), candidates[0])


def shares(intervals: Iterable[Interval]) -> dict[str, float]:
    """Seconds of each operation; time in which several run is divided among them."""
    intervals = list(intervals)
    edges = []
    for number, (start, end, _) in enumerate(intervals):
        edges += [(start, 1, number), (end, 0, number)]
    totals: dict[str, float] = defaultdict(float)
    running: set[int] = set()
    last = 0.0
    for time, starts, number in sorted(edges):
        for other in running:
            totals[intervals[other][2]] += (time - last) / len(running)
        last = time
        (running.add if starts else running.discard)(number)
    return dict(totals)


def cut(intervals: Iterable[Interval], read_by: Mapping[str, Iterable[str]]) -> list[Interval]:
    """The same of one device, none longer than until it runs again or an operation starts that reads its result."""
    intervals = sorted(intervals)
    starts: dict[str, list[float]] = defaultdict(list)
    for start, _, operation in intervals:
        starts[operation].append(start)

    def next_start(operation: str, after: float) -> float:
        later = starts.get(operation, ())
        place = bisect.bisect_right(later, after)
        return later[place] if place < len(later) else math.inf

    return [
        (
            start,
            min(end, *(next_start(other, start) for other in (operation, *read_by.get(operation, ())))),
            operation,
        )
        for start, end, operation in intervals
    ]


def _events(file: str | Path, read_by: Mapping[str, Iterable[str]]) -> Iterable[Interval]:
    """Runs of operations in a profile."""
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        # Work that goes on in other threads ends with an event of its own, with the number of its start. It may come late:
        # a thread that ends an operation goes on with those that waited for it, and tells of the end when there are none.
        ends, exact = {}, []
        starts: dict[int, list] = defaultdict(list)  # By device.
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name.startswith("end: "):
                    ends[stats.get("_c")] = event.start_ns
                elif "hlo_op" in stats or line.name == "XLA Ops":  # The latter of a TPU.
                    operation = str(stats.get("hlo_op", event.name)).split(" = ")[0].lstrip("%")
                    interval = event.start_ns / 1e9, event.end_ns / 1e9, operation
                    if "_p" in stats:
                        starts[stats.get("device_ordinal")].append((*interval, stats["_p"]))
                    else:
                        exact.append(interval)
        yield from exact
        for runs in starts.values():
            yield from cut(
                ((start, max(end, ends.get(number, 0) / 1e9), name) for start, end, name, number in runs),
                read_by,
            )
