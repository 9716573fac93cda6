"""MagNet on one's own images: a JSON Lines file, from pretrained encoders (README, "Train on your own images").

python main.py --config=configs/own.py --workdir=runs/own --config.data.root=data/mine.jsonl

The encoders are imported as in `configs/refcoco.py`; hardware, time and figure depend on the data.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The defaults on a file with the splits 'train' and 'val'."""
    c = common.get_config()
    c.data.source = "jsonl"
    c.data.root = "data/mine.jsonl"
    c.data.vocab = "weights/bert"
    c.init.swin = "weights/swin"
    c.init.bert = "weights/bert"
    return c
