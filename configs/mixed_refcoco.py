"""MagNet on RefCOCO, RefCOCO+ and G-Ref (UMD) together, without the pictures that any of them evaluates on.

python main.py --config=configs/mixed_refcoco.py --workdir=runs/mixed              after the imports of refcoco.py

One network for all three; hardware, time and figures: not measured.
"""

from ml_collections import ConfigDict

from configs import refcoco


def get_config() -> ConfigDict:
    """Three data sets of one REFER tree."""
    c = refcoco.get_config()
    c.data.source = "mixed"
    c.data.options = ConfigDict()
    c.data.options.parts = {
        "refcoco": {"source": "refer", "dataset": "refcoco", "partition": "unc"},
        "refcoco+": {"source": "refer", "dataset": "refcoco+", "partition": "unc"},
        "refcocog": {"source": "refer", "dataset": "refcocog", "partition": "umd"},
    }
    c.data.monitor_split = "refcoco/val"
    c.data.eval_splits = (
        *(f"{name}/{split}" for name in ("refcoco", "refcoco+") for split in ("val", "testA", "testB")),
        *("refcocog/val", "refcocog/test"),
    )
    return c
