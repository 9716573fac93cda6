"""A trained network from its run directory, for evaluation and prediction."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from input_pipeline import Tokenizer
from magnet_jax import workdir as run_files
from magnet_jax.checkpoint import Checkpointer
from magnet_jax.errors import UserError
from magnet_jax.network import Network, build_network
from magnet_jax.sharding import make_mesh, state_sharding
from magnet_jax.train_step import init_state


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network with the parameters of one checkpoint and all that belongs to it."""

    config: ConfigDict
    network: Network
    params: Any
    param_shardings: Any
    tokenizer: Tokenizer
    mesh: Mesh
    step: int


def load_trained(workdir: str | Path, config: ConfigDict | None = None) -> Trained:
    """Loads the checkpoint that `config.checkpoint.load` names; the run's own configuration where none is given.

    Raises UserError where there is no run, no checkpoint, or one of other shapes.
    """
    own = run_files.load_config(workdir)
    tokenizer = Tokenizer(str(Path(workdir) / "tokenizer"), own.data.max_words)
    config = own if config is None else with_vocabulary(config, tokenizer)
    mesh = make_mesh(config.mesh)
    network = build_network(config)
    init = functools.partial(init_state, network, optax.identity(), config.seed, batch_shapes(config))
    shapes = jax.eval_shape(init).params
    shardings = state_sharding(shapes, mesh, config.sharding)
    checkpointer = Checkpointer(workdir, read_only=True)
    params, step = checkpointer.restore_params(shapes, shardings, config.checkpoint.load)
    checkpointer.close()
    return Trained(config, network, params, shardings, tokenizer, mesh, step)


def with_vocabulary(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """A copy in which what was left to the tokenizer is filled in; raises UserError where it contradicts the tokenizer."""
    config = config.copy_and_resolve_references()
    if config.model.bert.vocab_size == 0:
        config.model.bert.vocab_size = tokenizer.vocab_size
    if config.loss.mask_id == -1:
        config.loss.mask_id = tokenizer.mask_id
    if config.model.bert.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.bert.vocab_size is {config.model.bert.vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size} words; set 0 to follow the tokenizer"
        )
    return config


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a global training batch."""
    b, side, words = config.data.batch_size, config.data.image_size, config.data.max_words
    return {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), np.float32),
        "mask": jax.ShapeDtypeStruct((b, side, side), np.uint8),
        "text_ids": jax.ShapeDtypeStruct((b, words), np.int32),
        "text_mask": jax.ShapeDtypeStruct((b, words), np.int32),
        "valid": jax.ShapeDtypeStruct((b,), np.bool_),
        "index": jax.ShapeDtypeStruct((b,), np.int32),
    }
