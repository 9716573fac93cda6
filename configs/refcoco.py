"""MagNet on RefCOCO (UNC): the released sizes, and LAVT's recipe, since MagNet's own is not published.

python -m magnet_jax.pretrained --kind=swin --source=swin_base_patch4_window12_384_22k.pth --out=weights/swin
python -m magnet_jax.pretrained --kind=bert --source=bert-base-uncased/ --out=weights/bert
python main.py --config=configs/refcoco.py --workdir=runs/refcoco

Published: val 75.24, testA 78.24, testB 71.05 oIoU; hardware and time: not measured.
To evaluate published weights: --mode=eval --config.init.magnet=DIR
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The defaults on a REFER tree, from pretrained encoders."""
    c = common.get_config()
    c.data.source = "refer"
    c.data.root = "data"  # Has refcoco/ and images/.
    c.data.options.dataset = "refcoco"
    c.data.options.partition = "unc"
    c.data.eval_splits = ("val", "testA", "testB")
    c.data.vocab = "weights/bert"  # The vocab.txt there.
    c.init.swin = "weights/swin"
    c.init.bert = "weights/bert"
    return c
