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
from magnet_jax import initial
from magnet_jax import workdir as run_files
from magnet_jax.checkpoint import Checkpointer, has_variables, restore_variables
from magnet_jax.errors import UserError
from magnet_jax.network import Network, build_model, build_network
from magnet_jax.sharding import make_mesh, state_sharding
from magnet_jax.train_step import init_state


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network with the variables of one checkpoint and all that belongs to it."""

    config: ConfigDict
    network: Network
    variables: Any  # {"params": ..., "batch_stats": ...}
    shardings: Any
    tokenizer: Tokenizer
    mesh: Mesh
    step: int

    @property
    def knows_absence(self) -> bool:
        """Whether training showed sentences that mean nothing in their picture, so that the class head can tell them."""
        return bool(self.config.data.get("has_absent") and self.config.loss.class_)


def load_trained(workdir: str | Path, config: ConfigDict | None = None) -> Trained:
    """Loads the checkpoint that `config.checkpoint.load` names; the run's own configuration where none is given.

    A folder that `--format=portable` wrote will do as well. Where there is no run, the imported weights of
    `config.init.magnet` or `.lavt` take its place. Raises UserError where there is neither, no checkpoint, or one of other
    shapes, and where both are there and differ.
    """
    if config is not None and not run_files.is_run(workdir) and initial.whole_network(config):
        return _load_imported(config)
    own = run_files.load_config(workdir)
    tokenizer = Tokenizer(str(Path(workdir) / "tokenizer"), own.data.max_words)
    if config is None:
        config = own
    else:
        kind = initial.whole_network(config)
        if kind and config.init[kind] != own.init[kind]:
            raise UserError(
                f"'{workdir}' holds a run that did not start from config.init.{kind} '{config.init[kind]}'; give another "
                "--workdir to use these weights, or leave the field empty to use the run's"
            )
        config = with_vocabulary(initial.with_imported_sizes(config, own)[0], tokenizer)
        if config.data.get("has_absent") is None:
            config.data.has_absent = own.data.get("has_absent")
    mesh = make_mesh(config.mesh)
    network = build_network(config)
    init = functools.partial(init_state, network, optax.identity(), config.seed, batch_shapes(config))
    shapes = jax.eval_shape(init).variables
    shardings = state_sharding(shapes, mesh, config.sharding)
    if has_variables(workdir):
        variables, step = restore_variables(workdir, shapes, shardings), 0
    else:
        checkpointer = Checkpointer(workdir, read_only=True)
        variables, step = checkpointer.restore_variables(shapes, shardings, config.checkpoint.load)
        checkpointer.close()
    return Trained(config, network, variables, shardings, tokenizer, mesh, step)


def _load_imported(config: ConfigDict) -> Trained:
    """The published network itself, without a training."""
    config, tokenizer, changes = prepare(config)
    mesh = make_mesh(config.mesh)
    network = Network(build_model(config.model))  # No head for training.
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch_shapes(config)))
    shardings = state_sharding(shapes, mesh, config.sharding)
    arrays, lines = initial.load_initial(shapes, config)
    print("\n".join(changes + lines), flush=True)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return Trained(config, network, initial.fill(placed, arrays), shardings, tokenizer, mesh, 0)


def prepare(config: ConfigDict, own: ConfigDict | None = None) -> tuple[ConfigDict, Tokenizer, list[str]]:
    """Completes a configuration from its vocabulary and from the weights that it starts from.

    own: the configuration of the run that it goes on with. Returns the configuration, its tokenizer and a line for
    every field that the weights changed. Raises UserError where the weights know another vocabulary.
    """
    tokenizer = Tokenizer(config.data.vocab, config.data.max_words)
    config, changes = initial.with_imported_sizes(config, own)
    config = with_vocabulary(config, tokenizer)
    for kind, path in initial.chosen_sources(config).items():
        words = (
            None
            if own is not None or kind == "swin"
            else initial.read_fields(path, kind)["bert"]["vocab_size"]
        )
        if words not in (None, tokenizer.vocab_size):
            raise UserError(
                f"config.data.vocab is '{config.data.vocab}' with {tokenizer.vocab_size} words, but the weights of "
                f"config.init.{kind} know {words}; give the vocab.txt that they were trained with"
            )
    return config, tokenizer, changes


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
        "image": jax.ShapeDtypeStruct((b, side, side, 3), np.uint8),
        "mask": jax.ShapeDtypeStruct((b, side, side), np.uint8),
        "text_ids": jax.ShapeDtypeStruct((b, words), np.int32),
        "text_mask": jax.ShapeDtypeStruct((b, words), np.int32),
        "valid": jax.ShapeDtypeStruct((b,), np.bool_),
        "index": jax.ShapeDtypeStruct((b,), np.int32),
    }
