"""The built-in data with sentences that mean no object, or several: the network also learns to say that there is none.

python main.py --config=configs/shapes_generalised.py --workdir=runs/generalised
"""

from ml_collections import ConfigDict

from configs import shapes


def get_config() -> ConfigDict:
    """As `configs/shapes.py`; read the `gres` figures, of which N-acc is the share of absent objects that are told."""
    c = shapes.get_config()
    c.data.options.generalised = True
    c.eval.protocols = ("squash", "gres")
    c.checkpoint.best_metric = "gres/gIoU"
    return c
