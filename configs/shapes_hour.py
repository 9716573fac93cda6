"""The built-in data set for an hour on a CPU: the small network of `configs/shapes.py` with more pixels and channels.

python main.py --config=configs/shapes_hour.py --workdir=runs/shapes_hour        2 CPU cores; not yet measured
"""

from ml_collections import ConfigDict

from configs import shapes


def get_config() -> ConfigDict:
    """A wider MagNet on larger pictures of shapes."""
    c = shapes.get_config()
    c.data.options.image_size = c.data.image_size = 96
    c.data.options.scenes = {"train": 20000, "val": 150, "testA": 150, "testB": 75, "rare": 150}

    swin = c.model.swin
    swin.embed_dim, swin.depths, swin.window = 32, (2, 2, 2, 2), 6

    c.optimizer.muon_largest = 128
    c.train.steps = 8500
    c.train.eval_every = c.checkpoint.every_steps = 1700
    return c
