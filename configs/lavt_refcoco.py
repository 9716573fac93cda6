"""LAVT on RefCOCO (UNC), the baseline: its sizes and its recipe.

python main.py --config=configs/lavt_refcoco.py --workdir=runs/lavt_refcoco        after the imports of refcoco.py

Published: val 72.73, testA 75.82, testB 68.79 oIoU; hardware and time: not measured.
To evaluate published weights: --mode=eval --config.init.lavt=DIR
With Mask Grounding: --config.loss.grounding=1
"""

from ml_collections import ConfigDict

from configs import refcoco


def get_config() -> ConfigDict:
    """LAVT in place of MagNet."""
    c = refcoco.get_config()
    use_lavt(c)
    c.model.gate_init = "released"
    c.optimizer.clip_norm = 0.0
    c.optimizer.no_decay = (r"(^|/)[a-z_]*norm[^/]*/", r"relative_position_bias")
    return c


def use_lavt(c: ConfigDict) -> None:
    """Replaces the network, and its losses by LAVT's own."""
    c.model.name = "lavt"
    for field in ("alignment", "pyramids", "language_fusion", "pixel_decoder", "mask_predictor"):
        del c.model[field]
    c.loss.cross_entropy = 1.0
    c.loss.bce = c.loss.dice = c.loss.class_ = c.loss.grounding = c.loss.alignment = 0.0
