"""Every field with its default: the released MagNet's sizes and recipe. Experiments change what they need."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults that every file of this folder starts from."""
    c = ConfigDict()
    c.seed = 0  # Everything random follows from it: initial values, order of the data, dropout, word masking.
    c.cpu_devices = 1  # Host devices that a CPU is divided into; 2 is faster for small networks on 2 cores.

    c.data = data = ConfigDict()
    data.source = "shapes"  # A source registered in input_pipeline.
    data.options = ConfigDict()  # Passed to the source as keyword arguments.
    data.seed = (
        0  # Of data that is made rather than read; `seed` stays out of it, so that repeats share their data.
    )
    data.train_split = "train"
    data.eval_splits = ("val",)  # Evaluated at the end of training and by --mode=eval.
    data.monitor_split = "val"  # Evaluated during training; its figure chooses the best checkpoint.
    data.image_size = 480  # Side that images are squashed to, pixels.
    data.max_words = 20  # Tokens per sentence, [CLS] and [SEP] included; longer ones are cut.
    data.vocab = "shapes"  # 'shapes', a vocab.txt, or a directory with tokenizer files.
    data.sentences = "one"  # Per epoch, of each object: 'one' sentence (as published) or 'all'.
    data.batch_size = 32  # Examples per step over all devices.
    data.workers = 2  # Threads that decode and resize.
    data.prefetch = 2  # Batches prepared ahead.

    c.model = ConfigDict()
    c.loss = ConfigDict()

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 5e-5
    optimizer.schedule = "polynomial"  # 'polynomial', 'cosine' or 'constant'; the first two end at 0.
    optimizer.power = 0.9  # Of the polynomial.
    optimizer.warmup_steps = 0  # Linear, from 0.
    optimizer.weight_decay = 0.01
    optimizer.no_decay = (
        r"(^|/)[a-z_]*norm[^/]*/",
        r"relative_position_bias",
        r"/bias$",
    )  # Names without it.
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.clip_norm = 1.0  # Global norm that gradients are cut to; 0 for never.
    optimizer.lr_multipliers = ()  # ((expression, factor), ...): the first found in a name scales its learning rate.

    c.train = train = ConfigDict()
    train.steps = 0  # 0: as many as `epochs` say.
    train.epochs = 40
    train.log_every = 50  # Steps between log lines.
    train.eval_every = 2000  # Steps between evaluations of the monitor split; 0 for only at the end.

    c.eval = evaluation = ConfigDict()
    evaluation.batch_size = 32
    evaluation.protocols = ("squash", "original", "gres")
    evaluation.monitor_examples = 1000  # Of the monitor split while training, evenly spread; 0 for all.
    evaluation.examples = 0  # Of every split at the end and by --mode=eval, evenly spread; 0 for all.
    evaluation.shuffled_text = True  # Also the floor: the same model given other pairs' sentences.
    evaluation.panels = 8  # Pictures (image, truth, prediction) per split.

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 2000
    checkpoint.keep = 2  # Latest ones; the best one stays too.
    checkpoint.best_metric = "squash/oIoU"  # 'protocol/figure' on the monitor split; higher is better.
    checkpoint.load = "latest"  # What --mode=eval and --mode=predict read: 'latest' or 'best'.

    c.mesh = (("data", -1),)  # Named axes of the device mesh; -1: all devices that are left.
    c.sharding = ((".*", "replicate"),)  # ((expression, 'replicate' | 'fsdp'), ...) by parameter name.
    return c
