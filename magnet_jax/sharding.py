"""The device mesh and where each array lives on it; parallelism is three lines of configuration.

`config.mesh = (("data", -1),)` names the axes (-1: all remaining devices); batches are split over 'data' and 'fsdp'.
`config.sharding = ((regex, tactic), ...)` gives every parameter and optimizer array, by its name, the tactic of the first
expression found in it: 'replicate', or the axis that its largest divisible dimension is split over, of which 'fsdp' is the
usual one.
"""

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from magnet_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
FSDP_MIN_BYTES = 2**20  # Smaller arrays cost more to gather than to hold.
JOINED = "joined"  # Name of a vector of many small arrays, which therefore lies whole on every device.


def make_mesh(axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes over all devices; at most one size may be -1 (the rest)."""
    devices = jax.devices() if devices is None else devices
    names, sizes = [name for name, _ in axes], [size for _, size in axes]
    if any(size != -1 and size < 1 for size in sizes):
        raise UserError(
            f"config.mesh is {tuple(map(tuple, axes))}; expected sizes of 1 or more, or -1 for the rest"
        )
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh is {tuple(map(tuple, axes))}, which does not fit the {len(devices)} devices here; "
            "make the sizes multiply to that number (-1 stands for the rest)"
        )
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that examples are split over."""
    return tuple(name for name in mesh.axis_names if name in BATCH_AXES)


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The example axis of a batch split over 'data' and 'fsdp', whichever there are."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(shapes, mesh: Mesh, rules: Sequence[tuple[str, str]]):
    """A tree like `shapes` of NamedSharding, by the first rule whose expression is found in the array's name."""

    compiled = [(compile_pattern(pattern, "sharding"), tactic) for pattern, tactic in rules]

    def place(path, leaf):
        name = path_name(path)
        if name.endswith(f"/{JOINED}"):
            return replicated(mesh)
        for pattern, tactic in compiled:
            if pattern.search(name):
                return NamedSharding(mesh, _spec(tactic, leaf, mesh))
        raise UserError(f"config.sharding has no rule for '{name}'; end it with ('.*', 'replicate')")

    return jax.tree_util.tree_map_with_path(place, shapes)


def compile_pattern(pattern: str, field: str) -> re.Pattern:
    """A regular expression of a field of the configuration; raises UserError where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:  # The latter of what is no text.
        raise UserError(
            f"config.{field} has '{pattern}', which is no regular expression ({error}); '.*' is everything"
        ) from error


def path_name(path) -> str:
    """The name of a leaf: the keys that lead to it, joined by '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(tactic: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> PartitionSpec:
    if tactic == "replicate":
        return PartitionSpec()
    axis = "data" if tactic == "fsdp" and "fsdp" not in mesh.axis_names else tactic
    if axis not in mesh.axis_names:
        raise UserError(
            f"config.sharding has the tactic '{tactic}'; expected 'replicate', 'fsdp' or an axis of config.mesh "
            f"({', '.join(mesh.axis_names)})"
        )
    if math.prod(leaf.shape) * leaf.dtype.itemsize < FSDP_MIN_BYTES:
        return PartitionSpec()
    for dimension in sorted(range(len(leaf.shape)), key=lambda d: -leaf.shape[d]):
        if leaf.shape[dimension] % mesh.shape[axis] == 0:
            return PartitionSpec(*(axis if d == dimension else None for d in range(len(leaf.shape))))
    return PartitionSpec()
