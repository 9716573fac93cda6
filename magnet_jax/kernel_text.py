"""How many cycles a Pallas kernel of a TPU takes: read off its schedule, which libtpu prints bundle by bundle.

A TPU's core begins a bundle of instructions every cycle, as its compiler has arranged them; the time for which it waits for
memory, which kernels read ahead, is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PASS = "final_bundles"  # What libtpu calls the schedule.
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(\w\w)?\s*:\s*((?:> ?)*)\{")
_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_KERNEL = re.compile(r'%([\w.\-]+) = .*custom_call_target="tpu_custom_call".*?"body":"([^"]*)"')


def cycles(schedule: Iterable[str]) -> int:
    """Bundles of a schedule, those of loops as often as they run; what is done under a condition counts as done."""
    lines = []  # Depth, whether a loop begins, and the trips of one whose end is tested (0: none is).
    for line in schedule:
        if bundle := _BUNDLE.match(line):
            found = _TRIPS.search(line)
            lines.append((bundle[2].count(">"), bundle[1] == "LB", int(found[1]) if found else 0))
    trips: dict[int, int] = {}
    total = 0
    for number, (depth, begins, _) in enumerate(lines):
        if begins:
            trips[depth] = _trips(lines, number)
        times = 1
        for outer in range(1, depth + 1):
            times *= trips.get(outer, 1)
        total += times
    return total


def _trips(lines: list[tuple[int, bool, int]], first: int) -> int:
    """Of the loop that begins at a line; its end is tested before another begins that is not within it."""
    depth = lines[first][0]
    for number, (other, begins, trips) in enumerate(lines[first:]):
        if number and begins and other <= depth:
            break
        if trips and other == depth:
            return trips
    return 1


def kernel_cycles(hlo_text: str, folder: Path) -> dict[str, int]:
    """Cycles of the kernels of a compiled program, of which libtpu wrote the schedules into a folder, each kind once."""
    kernels = dict(_KERNEL.findall(hlo_text))
    found = {}
    for file in folder.glob(f"*-{PASS}.txt"):
        operation = re.search(rf"^\d+-(.*)-\d+-{PASS}$", file.stem)
        if operation and operation[1] in kernels:
            with file.open() as schedule:
                found[kernels[operation[1]]] = cycles(schedule)
    return {operation: found[body] for operation, body in kernels.items() if body in found}
