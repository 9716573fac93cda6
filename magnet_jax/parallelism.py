"""The train step on all devices: jit over a mesh, which is the default, or pmap. Both compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from input_pipeline.device import prefetch_to_device, rows_by_process
from magnet_jax.errors import UserError
from magnet_jax.network import PMAP_AXIS, Network
from magnet_jax.sharding import batch_sharding, replicated
from magnet_jax.total_loss import Batch, Metrics
from magnet_jax.train_step import TrainState, make_eval_step

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def jit_train_step(step: Step, shardings: TrainState, mesh: Mesh) -> Step:
    """A train step over a mesh; it takes over the memory of the state that it is given, metrics go to every device."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(network: Network, shardings: Any, mesh: Mesh) -> Callable:
    """The evaluation step over a mesh; outputs are small and go to every device."""
    return jax.jit(
        make_eval_step(network, batch_sharding(mesh)),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def jit_init(init: Callable, shardings: Any, mesh: Mesh) -> Callable:
    """What makes a state, each part where it will lie.

    It runs once: on a CPU, where compiling it is all that it costs, with less optimisation.
    """
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(init, out_shardings=shardings, compiler_options=options if on_cpu else None)


class Jit:
    """One program over a mesh: parameters lie where `shardings` says, batches are split over 'data' and 'fsdp'."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.batch_sharding = mesh, batch_sharding(mesh)
        # What `make_train_step` has to know of where arrays lie.
        self.within_step = {"batch_sharding": self.batch_sharding}

    def compile(
        self, step: Step, shapes: TrainState, shardings: TrainState, batch: Mapping[str, Any]
    ) -> Step:
        """The compiled step; it takes over the memory of the state that it is given."""
        return jit_train_step(step, shardings, self.mesh).lower(shapes, batch).compile()

    def to_own(self, state: TrainState) -> TrainState:
        """A state as the compiled step takes it."""
        return state

    def to_global(self, state: TrainState) -> TrainState:
        """A state as checkpoints and evaluation take it."""
        return state

    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of a batch that this process has to give."""
        return rows_by_process(self.batch_sharding, batch_size)[jax.process_index()]

    def batches(self, batches: Iterable[Mapping[str, np.ndarray]], batch_size: int) -> Iterator[Batch]:
        """This process's rows of global batches on their way to the devices."""
        return prefetch_to_device(batches, self.batch_sharding, batch_size)


class Pmap:
    """A copy of everything on every device, and an axis over which the copies sum what they find.

    Raises UserError for a mesh or a placement that is more than that.
    """

    def __init__(self, mesh: Mesh, config: ConfigDict):
        tactics = {tactic for _, tactic in config.sharding}
        if tactics != {"replicate"} or math.prod(mesh.shape.values()) != mesh.shape.get("data"):
            raise UserError(
                "config.parallelism is 'pmap', which only copies: config.mesh must be (('data', -1),) and config.sharding "
                "(('.*', 'replicate'),); take 'jit' for anything else"
            )
        self.mesh = mesh
        self.within_step = {"axis_name": PMAP_AXIS}  # What a step sees is one device's share.

    def compile(
        self, step: Step, shapes: TrainState, shardings: TrainState, batch: Mapping[str, Any]
    ) -> Step:
        """The step, compiled when it is first called; it takes over the memory of the state that it is given."""
        del shapes, shardings, batch  # Ahead of time, pmap compiles in one process only.
        mapped = jax.pmap(step, PMAP_AXIS, donate_argnums=0)

        def run(state, batch):
            state, metrics = mapped(state, batch)
            return state, jax.tree.map(lambda copies: copies.addressable_shards[0].data[0], metrics)

        return run

    def to_own(self, state: TrainState) -> TrainState:
        """A state as the compiled step takes it: the devices' copies along a new first axis."""
        devices = jax.local_devices()
        sharding = NamedSharding(Mesh(devices, (PMAP_AXIS,)), PartitionSpec(PMAP_AXIS))

        def stack(leaf):
            copies = {shard.device: shard.data[None] for shard in leaf.addressable_shards}
            return jax.make_array_from_single_device_arrays(
                (len(devices), *leaf.shape), sharding, [copies[device] for device in devices]
            )

        return jax.tree.map(stack, state)

    def to_global(self, state: TrainState) -> TrainState:
        """A state as checkpoints and evaluation take it."""

        def unstack(leaf):
            copies = [shard.data[0] for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape[1:], replicated(self.mesh), copies)

        return jax.tree.map(unstack, state)

    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of a batch that this process has to give."""
        return np.split(np.arange(batch_size), jax.process_count())[jax.process_index()]

    def batches(self, batches: Iterable[Mapping[str, np.ndarray]], batch_size: int) -> Iterator[Batch]:
        """This process's rows of global batches, divided over its devices."""
        del batch_size
        count = jax.local_device_count()
        for batch in batches:
            yield {name: value.reshape(count, -1, *value.shape[1:]) for name, value in batch.items()}


def make_parallelism(config: ConfigDict, mesh: Mesh) -> Jit | Pmap:
    """What `config.parallelism` names; raises UserError for anything but 'jit' and 'pmap'."""
    if config.parallelism not in ("jit", "pmap"):
        raise UserError(f"config.parallelism is '{config.parallelism}'; expected 'jit' or 'pmap'")
    return Jit(mesh) if config.parallelism == "jit" else Pmap(mesh, config)
