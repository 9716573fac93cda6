"""One variant of the ablation study on the built-in data set; the variants are in configs/ablation.py.

python -m magnet_jax.study --study=ablation --seeds=0,1,2,3,4 --out=DIR
python main.py --config=configs/ablation_shapes.py:all --workdir=runs/ablation_all
"""

from ml_collections import ConfigDict

from configs import shapes
from configs.ablation import STUDIES, VARIANTS, use_variant

__all__ = ["FLAVOURS", "STUDIES", "VARIANTS", "get_config"]

# Data that `python -m magnet_jax.study --flavours=...` may name; the first is the default.
FLAVOURS = {
    "mixed": {},
    "refcoco": {"data.options.flavour": "refcoco"},
    "refcoco+": {"data.options.flavour": "refcoco+"},
    "refcocog": {"data.options.flavour": "refcocog"},
}


def get_config(variant: str = "all") -> ConfigDict:
    """The network and data of `configs/shapes.py`, fewer steps, and the losses of a variant."""
    c = shapes.get_config()
    c.data.options.flavour = "mixed"
    c.train.steps = 2000
    c.train.eval_every = c.checkpoint.every_steps = 500
    c.eval.panels = 4
    c.eval.protocols = ("squash",)
    return use_variant(c, variant)
