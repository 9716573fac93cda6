"""Five steps of one network in every form of parallelism, each on eight devices: `python -m tests.parallel_forms NAME OUT`.

NAME is 'stand_in' (compiles in no time), 'magnet' or 'lavt' (the real ones, very small). OUT is a .npz file with the losses,
the parameters and the bytes that one device holds, by form.
"""

import sys
from pathlib import Path

import jax

if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # Fast compilation and its cache,

    jax.config.update("jax_num_cpu_devices", 8)  # but eight devices.

import flax.linen as nn
import numpy as np

from configs import debug
from configs.lavt_refcoco import use_lavt
from magnet_jax import optim, sharding
from magnet_jax.models import lavt, magnet, mask_predictor, pixel_decoder
from magnet_jax.network import build_network
from magnet_jax.optim import make_optimizer
from magnet_jax.parallelism import make_parallelism
from magnet_jax.sharding import make_mesh, path_name, state_sharding
from magnet_jax.train_step import init_state, make_train_step
from tests.stand_in import MASK, SIDE, VOCABULARY, WORDS, make_batch, stand_in

STEPS, BATCH = 5, 16
FSDP = ((r".*", "fsdp"),)
FORMS = {  # devices, config.mesh, config.sharding, parallelism, accumulate
    "one device": (1, (("data", 1),), None, "jit", 1),
    "data": (8, (("data", 8),), None, "jit", 1),
    "fsdp": (8, (("fsdp", 8),), FSDP, "jit", 1),
    "data x fsdp": (8, (("data", 4), ("fsdp", 2)), FSDP, "jit", 1),
    "pmap": (8, (("data", 8),), None, "pmap", 1),
    "accumulate": (8, (("data", 4), ("fsdp", 2)), FSDP, "jit", 2),
}


def make_config(name):
    """The debug configuration; every kind of randomness is on."""
    config = debug.get_config()
    config.data.batch_size = BATCH
    if name == "lavt":
        use_lavt(config)
        config.loss.grounding = config.loss.alignment = 1.0
    config.model.bert.vocab_size = VOCABULARY
    config.loss.mask_id = MASK
    config.optimizer.flatten = False
    # Where a gradient is rounding alone, Adam would make a whole step of it.
    config.optimizer.eps = 1e-3
    return config


def run(name, form, remat=()):
    """Losses [steps] and the final parameters by name, and the bytes of the state on the first device."""
    count, mesh_axes, rules, parallelism, accumulate = FORMS[form]
    config = make_config(name)
    config.mesh, config.parallelism = mesh_axes, parallelism
    config.model.remat = remat
    if rules:
        config.sharding = rules
    devices = jax.devices()[:count]
    mesh = make_mesh(config.mesh, devices)
    network = stand_in(dropout=0.3) if name == "stand_in" else build_network(config)
    tx, _ = make_optimizer(config.optimizer, STEPS)
    batches = [make_batch(seed, BATCH) for seed in range(STEPS)]
    for batch in batches:
        batch["image"] = (batch["image"] * 50 + 128).clip(0, 255).astype(np.uint8)
        batch["valid"][3] = False
    shapes = jax.eval_shape(lambda: init_state(network, tx, 0, batches[0]))
    shardings = state_sharding(shapes, mesh, config.sharding)
    ways = make_parallelism(config, mesh)
    step = make_train_step(
        network,
        tx,
        config.loss,
        accumulate=accumulate,
        **ways.within_step,
    )
    template = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in batches[0].items()}
    compiled = ways.compile(step, shapes, shardings, template)
    # Made without a mesh, so that all begin alike.
    initial = jax.jit(lambda: init_state(network, tx, 0, batches[0]))()
    state = jax.tree.map(lambda x, where: jax.device_put(np.asarray(x), where), initial, shardings)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    state, losses = ways.to_own(state), []
    for batch in ways.batches(iter(batches), BATCH):
        state, metrics = compiled(state, batch)
        losses.append({key: float(value) for key, value in metrics.items()})
    state = ways.to_global(state)
    leaves = jax.tree_util.tree_leaves_with_path({"params": state.params, "batch_stats": state.batch_stats})
    return losses, {path_name(path): np.asarray(leaf) for path, leaf in leaves}, held


def main(name, out):
    """Runs every form and writes what came out."""
    sharding.FSDP_MIN_BYTES, optim.SMALL = 0, 20  # Nothing here is large; biases are small.
    # The derivative of a ReLU jumps: a value that rounding of 1e-7 carries across zero changes a gradient by 1e-3. Which
    # of 100,000 values lies there is chance, not the form, so the networks are compared with a smooth activation.
    for module in (lavt, magnet, mask_predictor, pixel_decoder):
        module.relu = nn.softplus
    arrays = {}
    for form in FORMS:
        if name == "lavt" and form == "accumulate":
            continue  # BatchNorm sees the parts one by one.
        losses, params, held = run(name, form)
        for key in losses[0]:
            arrays[f"{form}|metrics|{key}"] = np.array([row[key] for row in losses])
        arrays |= {f"{form}|arrays|{key}": value for key, value in params.items()}
        arrays[f"{form}|bytes"] = np.array(held)
        print(name, form, losses[-1]["loss"], flush=True)
    np.savez(Path(out), **arrays)


if __name__ == "__main__":
    assert (SIDE, WORDS) == (32, 8)
    main(*sys.argv[1:])
