"""A minute-long run that touches everything, for tests and for trying changes out.

python main.py --config=configs/debug.py --workdir=DIR

2 CPU cores, a minute, most of it compiling; learns next to nothing.
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
    c.model.pyramids = (1, 2)
    c.model.swin.embed_dim = 8
    c.model.swin.depths = (1, 1, 1, 1)
    c.model.swin.heads = (1, 1, 2, 2)
    c.model.swin.window = 4
    c.model.swin.drop_path = 0.1
    c.model.bert.hidden = 16
    c.model.bert.heads = 2
    c.model.bert.intermediate = 32
    c.model.bert.splits = (1, 1, 2, 2)
    c.model.bert.max_positions = 32
    c.model.pixel_decoder.channels = 16
    c.model.pixel_decoder.layers = 1
    c.model.pixel_decoder.heads = 2
    c.model.pixel_decoder.points = 2
    c.model.pixel_decoder.feedforward = 32
    c.model.pixel_decoder.groups = 4
    c.model.mask_predictor.layers = 1
    c.model.mask_predictor.heads = 2
    c.model.mask_predictor.feedforward = 32
    c.grounding_head.layers = 1
    c.grounding_head.heads = 2
    c.grounding_head.intermediate = 32
    c.optimizer.learning_rate = 1e-3
    c.optimizer.flatten = True
    c.train.steps = 12
    c.train.log_every = 4
    c.train.eval_every = 6
    c.eval.batch_size = 8
    c.eval.monitor_examples = 10
    c.eval.examples = 20
    c.eval.panels = 2
    c.checkpoint.every_steps = 4
    return c
