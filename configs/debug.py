"""A minute-long run that touches everything, for tests and for trying changes out.

python main.py --config=configs/debug.py --workdir=/tmp/debug        2 CPU cores, under a minute; learns next to nothing.
"""

from configs import common


def get_config():
    """The smallest network and data that still have every part."""
    c = common.get_config()
    c.data.options.image_size = 32
    c.data.options.scenes = 16
    c.data.image_size = 32
    c.data.max_words = 16
    c.data.sentences = "all"
    c.data.batch_size = 4
    c.optimizer.learning_rate = 1e-3
    c.train.steps = 12
    c.train.log_every = 4
    c.train.eval_every = 6
    c.eval.batch_size = 8
    c.eval.monitor_examples = 10
    c.eval.examples = 20
    c.eval.panels = 2
    c.checkpoint.every_steps = 4
    return c
