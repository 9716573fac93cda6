"""A small MagNet on one's own images, from nothing: no weights, no accelerator (README, "Train on your own images").

python -m input_pipeline vocabulary --root=data/mine.jsonl --out=data/vocab.txt
python main.py --config=configs/own_small.py --workdir=runs/mine --config.data.root=data/mine.jsonl

A few pictures it learns by heart in minutes, which shows that the data are right; to know others it needs thousands, or
`configs/own.py`, which starts from pretrained encoders.
"""

from ml_collections import ConfigDict

from configs import shapes


def get_config() -> ConfigDict:
    """The network of `configs/shapes.py` on pictures of 128 pixels."""
    c = shapes.get_config()
    c.data.source = "jsonl"
    c.data.root = "data/mine.jsonl"
    c.data.options = ConfigDict()
    c.data.vocab = "data/vocab.txt"
    c.data.image_size = 128
    c.data.eval_splits = ("val",)
    c.data.batch_size = 4
    c.data.augment.flip = 0.5
    c.data.augment.jitter = 0.2
    c.optimizer.warmup_steps = 50
    c.train.steps = 400
    c.train.log_every = 20
    c.train.eval_every = c.checkpoint.every_steps = 200
    c.eval.batch_size = 4
    return c
