"""What the text of a compiled program tells of its cost: collectives, and the cycles that the TPU compiler estimates."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CONTAINERS = ("while", "call", "conditional")  # Stand for other operations.
_VIEWS = ("bitcast", "get-tuple-element", "tuple")  # Nothing is done for them.
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([\d,]*)\]")
# Operations of a kind that takes time by itself; where the compiler says nothing of one, only its bytes are known.
_SILENT = (
    "fusion",
    "gather",
    "scatter",
    "custom-call",
    "sort",
    "convolution",
    "dot",
    "copy",
    "reshape",
    "transpose",
)
_SILENT += (
    "concatenate",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "pad",
    "reverse",
    "reduce",
    "broadcast",
)
# Custom calls of a TPU's compiler that only name memory or say something of it.
_FREE = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")


@dataclasses.dataclass
class Cost:
    """What one run of a program, or of a computation in it, costs a device."""

    # By the name of the operation: cycles that the compiler tells, and, where it tells none, bytes read and written.
    cycles: Counter[str] = dataclasses.field(default_factory=Counter)
    silent_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    sizes: dict[str, float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )  # Bytes of results.
    wire: float = 0.0  # Bytes that the device sends, by ring algorithms.
    channels: set[str] = dataclasses.field(default_factory=set)  # Of the collectives counted.

    def add(self, other: Cost, times: float) -> None:
        """Adds another cost, several times."""
        self.wire += times * other.wire
        for mine, theirs in (
            (self.cycles, other.cycles),
            (self.silent_bytes, other.silent_bytes),
            (self.counts, other.counts),
            (self.sizes, other.sizes),
        ):
            for kind, value in theirs.items():
                mine[kind] += times * value


def cost(text: str, kernels: Mapping[str, int] | None = None, bytes_per_cycle: float = math.inf) -> Cost:
    """Reads the text of a compiled module; bodies of loops count as often as they run.

    Of branches the cheapest counts: the others are for the exception, and what is taken only a run can tell. kernels: cycles
    of operations that are known from elsewhere; bytes_per_cycle: what the memory gives.
    """
    kernels = kernels or {}
    computations, entry = _computations(text)
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            found = known[name] = Cost()
            shapes = {}
            for line in computations[name]:
                _add_line(found, line, shapes, of, computations, kernels, bytes_per_cycle)
        return known[name]

    return of(entry)


def operation_names(text: str) -> dict[str, list[str]]:
    """Where the operations of a compiled module come from, but those that only stand for others.

    Of each its own name in the program ('' for none), then, of a fusion, the names within it, the commonest first.
    """
    own: dict[str, str] = {}
    within: dict[str, Counter] = {}
    fusions: dict[str, str] = {}
    for computation, lines in _computations(text)[0].items():
        within[computation] = Counter()
        for line in lines:
            match = _LINE.match(line)
            if not match or match[2] in _CONTAINERS:
                continue
            operation = _operation(line)
            given = re.search(r'op_name="([^"]*)"', line)
            own[operation] = given[1] if given else ""
            within[computation][own[operation]] += 1
            if called := re.search(r"calls=%?([\w.\-]+)", line):
                fusions[operation] = called[1]
    return {
        operation: [name, *(inner for inner, _ in within[fusions[operation]].most_common())]
        if operation in fusions
        else [name]
        for operation, name in own.items()
    }


def readers(text: str) -> dict[str, set[str]]:
    """The operations of a compiled module that read an operation's result, with no more than a view between them."""
    users: dict[str, set[str]] = defaultdict(set)
    views = set()
    for line in itertools.chain(*_computations(text)[0].values()):
        if match := _LINE.match(line):
            operation = _operation(line)
            if match[2] in _VIEWS:
                views.add(operation)
            for operand in _operands(match[3]):
                users[operand].add(operation)

    def of(operation: str) -> set[str]:
        return set().union(*(of(user) if user in views else {user} for user in users.get(operation, ())))

    return {operation: of(operation) for operation in users.keys() - views}


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _operation(line: str) -> str:
    return line.split(" = ")[0].split("%")[-1].strip()


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith((" ", "HloModule")):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            found[name].append(line)
    return found, entry


def _add_line(
    total: Cost,
    line: str,
    shapes: dict[str, int],
    of: Callable[[str], Cost],
    computations: dict[str, list[str]],
    kernels: Mapping[str, int],
    bytes_per_cycle: float,
) -> None:
    match = _LINE.match(line)
    if not match:
        return
    result, operation, rest = match.groups()
    name = _operation(line)
    shapes[name] = size = _size(result)
    if name in kernels:
        total.cycles[name] += kernels[name]
        return
    if operation == "while":
        body, condition = (re.search(rf"{key}=%?([\w.\-]+)", rest)[1] for key in ("body", "condition"))
        total.add(of(body), _trips(rest, computations[condition]))
        return
    if operation == "conditional":
        branches = map(of, _branches(rest))
        total.add(min(branches, key=lambda c: c.cycles.total() + c.silent_bytes.total() / bytes_per_cycle), 1)
        return
    if operation in ("call", "async-start") and (
        called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", rest)
    ):
        found = of(called[1])
        if operation == "async-start":  # Memory that is moved ahead of its use is moved beside other work.
            found = dataclasses.replace(found, silent_bytes=Counter())
        total.add(found, 1)
        return
    if operation.removesuffix("-start") in COLLECTIVES:
        _add_collective(total, operation, result, rest)
        return
    if operation == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", rest)):
        # A TPU sends within fusions: a sum of which each keeps a part, and pieces of one transfer between products.
        for inner in filter(None, map(_LINE.match, computations.get(called[1], ()))):
            if inner[2].removesuffix("-start") in COLLECTIVES:
                if called[1].startswith("all-reduce-scatter"):
                    _add_collective(total, "reduce-scatter", result, inner[3])
                else:
                    _add_collective(total, inner[2], inner[1], inner[3])
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    if cycles:
        total.cycles[name] += int(cycles[1])
    elif operation in _SILENT and not any(f'custom_call_target="{name}"' in rest for name in _FREE):
        total.silent_bytes[name] += size + sum(shapes.get(operand, 0) for operand in _operands(rest))


def _add_collective(total: Cost, operation: str, result: str, rest: str) -> None:
    channel = re.search(r"channel_id=(\d+)", rest)
    if channel and channel[1] in total.channels:
        return  # Another piece of the same.
    if channel:
        total.channels.add(channel[1])
    kind = operation.removesuffix("-start")
    size = _size(_started(kind, result) if operation.endswith("-start") else result)
    members = _members(rest)
    total.counts[kind] += 1
    total.sizes[kind] += size
    total.wire += (
        size
        * {
            "all-reduce": 2 * (members - 1) / members,
            "all-gather": (members - 1) / members,
            "reduce-scatter": members - 1,  # Of a result that is one part.
            "all-to-all": (members - 1) / members,
            "collective-permute": 1,
        }[kind]
    )


def _size(shape: str) -> int:
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in _SHAPE.findall(shape)
    )


def _started(kind: str, shape: str) -> str:
    """Shapes of the results of a collective that is started, which gives (operands, results, ...); a sum results alone."""
    if kind == "all-reduce" or not shape.startswith("("):
        return shape
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1]


def _branches(rest: str) -> list[str]:
    """Computations of which a conditional runs one."""
    numbered = re.search(r"branch_computations=\{([^}]*)\}", rest)
    of = r"%?([\w.\-]+)"
    return re.findall(of, numbered[1]) if numbered else re.findall(rf"(?:true|false)_computation={of}", rest)


def _trips(rest: str, condition: list[str]) -> int:
    """How often a loop runs: what the compiler says, else the constant that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    if known:
        return int(known[1])
    constants = [int(n) for line in condition for n in re.findall(r"constant\((\d+)\)", line)]
    return max(constants, default=1)


def _members(rest: str) -> int:
    """How many devices take part in a collective together."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    return 2
