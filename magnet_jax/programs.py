"""The programs of a configuration as they run on devices, to be compiled and measured without data or a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from input_pipeline import DataError, Tokenizer
from magnet_jax.errors import UserError
from magnet_jax.network import build_network
from magnet_jax.optim import make_optimizer
from magnet_jax.parallelism import Jit, jit_eval_step, jit_init, jit_train_step
from magnet_jax.sharding import batch_parts, batch_sharding, replicated, state_sharding
from magnet_jax.train_step import configured_train_step, init_state, make_gradient
from magnet_jax.trained import batch_shapes, with_vocabulary

STEPS = ("eval", "gradient", "train")
_BERT_WORDS, _BERT_MASK = 30522, 103  # Of BERT-base-uncased.
_SOME_STEPS = 1000  # What a learning rate falls over is of no concern here.


@dataclasses.dataclass(frozen=True)
class Program:
    """One step of a configuration on a mesh.

    `function` is jitted and takes a state and a batch: of 'train' the whole state, which it takes over and returns first, of
    the others its variables; `state` and `batch` are their shapes, `shardings` where the state lies.
    """

    function: Callable
    plain: Callable  # The same as the network is defined, whatever forms suit the devices.
    state: Any
    shardings: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], Any]  # Makes such a state, with values to start a training from.
    size: int
    parameters: int

    def flops(self) -> int:
        """Of matrix products and convolutions of the network as it is defined, see `count_flops`."""
        return count_flops(jax.make_jaxpr(self.plain)(self.state, self.batch).jaxpr)


def build_program(config: ConfigDict, mesh: Mesh, step: str, where: str = "this machine") -> Program:
    """The step of that name of a configuration; `where` names the mesh in errors.

    Raises UserError for an unknown step and for a batch that does not suit the mesh.
    """
    if step not in STEPS:
        raise UserError(f"--step is '{step}'; expected one of {', '.join(STEPS)}")
    section = "eval" if step == "eval" else "data"
    size = config[section].batch_size
    parts = batch_parts(mesh) * (config.train.accumulate if step == "train" else 1)
    if size % parts:
        raise UserError(f"config.{section}.batch_size is {size}; {where} needs a multiple of {parts}")
    config = config.copy_and_resolve_references()
    config.data.batch_size, config.parallelism = size, "jit"
    network = build_network(config, mesh.devices.flat[0].platform)
    batch = batch_shapes(config)
    tx, schedule = make_optimizer(config.optimizer, _SOME_STEPS)
    ema = bool(config.train.ema)
    if step != "train":
        tx, ema = optax.identity(), False

    def init():
        state = init_state(network, tx, config.seed, batch, ema=ema)
        return state if step == "train" else state.variables

    def function(network):
        if step == "train":
            train_step = configured_train_step(config, network, tx, schedule, **Jit(mesh).within_step)
            return jit_train_step(train_step, shardings, mesh)
        if step == "gradient":
            return jax.jit(
                make_gradient(network, config.loss, batch_sharding(mesh)),
                in_shardings=(shardings, batch_sharding(mesh)),
                out_shardings=(replicated(mesh), shardings["params"]),
            )
        return jit_eval_step(network, shardings, mesh)

    state = jax.eval_shape(init)
    shardings = state_sharding(state, mesh, config.sharding)
    params = state.params if step == "train" else state["params"]
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    jitted_init = jit_init(init, shardings, mesh)
    plain = function(build_network(_without_forms(config), "cpu"))
    return Program(function(network), plain, state, shardings, batch, jitted_init, size, parameters)


def _without_forms(config: ConfigDict) -> ConfigDict:
    """The same computed in forms that have no products but those of the network itself."""
    config = config.copy_and_resolve_references()
    if "swin" in config.model:
        config.model.swin.attention = "auto"
    if "pixel_decoder" in config.model:
        config.model.pixel_decoder.sampling = "auto"
    return config


def random_batch(program: Program, config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """Examples of the shapes that a program takes: noise with a rectangle for a mask, sentences of random words."""
    random, shapes = np.random.default_rng(seed), program.batch
    batch = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    size, height, width = batch["mask"].shape
    batch["image"] = random.integers(0, 256, batch["image"].shape, np.uint8)
    batch["mask"][:, height // 4 : height // 2, width // 4 : width // 2] = 1
    length = batch["text_ids"].shape[1]
    batch["text_ids"][:] = random.integers(0, config.model.bert.vocab_size, (size, length))
    batch["text_mask"][:, : max(length // 2, 3)] = 1
    batch["valid"][:] = True
    return batch


def count_flops(jaxpr) -> int:
    """FLOPs of matrix products and convolutions of a program, bodies of scans, and kernels, as often as they run.

    A product of [m, k] and [k, n] is 2 m k n. What is computed again for the backward pass (remat) counts again; of
    branches counts the cheapest: that samples are products on some platforms is no work that the network asks for.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "pallas_call":
            times = math.prod(equation.params["grid_mapping"].grid)
        inner = [count_flops(jaxpr) for jaxpr in _inner_jaxprs(equation.params)]
        total += times * (min(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an operation runs."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # Of a closed one.
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def complete(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """A configuration whose vocabulary may not be here, with the size that BERT's has; and a line that says so."""
    try:
        return with_vocabulary(config, Tokenizer(config.data.vocab, config.data.max_words)), []
    except DataError as error:
        config = config.copy_and_resolve_references()
        config.model.bert.vocab_size = config.model.bert.vocab_size or _BERT_WORDS
        config.loss.mask_id = _BERT_MASK if config.loss.mask_id == -1 else config.loss.mask_id
        return config, [f"note: {error}; taken to have {config.model.bert.vocab_size} words"]
