"""One variant of the ablation study on RefCOCO; the variants are in configs/ablation.py.

python -m magnet_jax.study --study=ablation --config=configs/ablation_refcoco.py --seeds=0,1,2 --out=DIR
python main.py --config=configs/ablation_refcoco.py:mg --workdir=runs/ablation_mg

Hardware and time: not measured.
"""

from ml_collections import ConfigDict

from configs import refcoco
from configs.ablation import STUDIES, VARIANTS, use_variant

__all__ = ["FLAVOURS", "STUDIES", "VARIANTS", "get_config"]

# Data that `python -m magnet_jax.study --flavours=...` may name; the first is the default.
FLAVOURS = {
    "refcoco": {},
    "refcoco+": {"data.options.dataset": "refcoco+"},
    "refcocog": {
        "data.options.dataset": "refcocog",
        "data.options.partition": "umd",
        "data.eval_splits": ("val", "test"),
    },
}


def get_config(variant: str = "all") -> ConfigDict:
    """The network and recipe of `configs/refcoco.py` with the fusion and losses of a variant."""
    return use_variant(refcoco.get_config(), variant)
