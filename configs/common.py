"""Every field with its default: the released MagNet's sizes and recipe. Experiments change what they need."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The defaults that every file of this folder starts from."""
    c = ConfigDict()
    c.seed = 0  # Everything random follows from it: initial values, order of the data, dropout, word masking.
    c.cpu_devices = 1  # Host devices that a CPU is divided into.

    c.data = data = ConfigDict()
    # 'shapes', 'refer' (RefCOCO, RefCOCO+, G-Ref), 'tfds', 'grefcoco', 'jsonl' (one's own) or 'mixed'.
    data.source = "shapes"
    data.root = ""  # Folder of the data, or a .jsonl file.
    data.options = ConfigDict()  # Passed to the source as keyword arguments.
    # Of data that is made rather than read; apart from `seed`, so that repeats of a training share their data.
    data.seed = 0
    data.split = "train"  # To train on.
    data.eval_splits = ("val",)  # Evaluated at the end of training and by --mode=eval.
    data.monitor_split = "val"  # Evaluated during training; its figure chooses the best checkpoint.
    data.image_size = 480  # Side that images are squashed to, pixels.
    data.max_words = 20  # Tokens per sentence, [CLS] and [SEP] included; longer ones are cut.
    data.vocab = "shapes"  # 'shapes', a vocab.txt, or a directory with tokenizer files.
    # Whether some sentences to train on mean nothing in their picture, so that the network learns to say so; training
    # looks, where this is left open.
    data.has_absent = config_dict.placeholder(bool)
    data.sentences = "one"  # Per epoch, of each object: 'one' sentence (as published) or 'all'.
    data.batch_size = 32  # Examples per step over all devices.
    data.augment = augment = ConfigDict()  # Of training examples; off as in the papers.
    augment.flip = 0.0  # Share that is mirrored, left and right exchanged in the sentence.
    augment.jitter = 0.0  # Largest relative change of brightness, contrast and saturation.
    augment.crop = (
        1.0  # Smallest share of a side that a random crop keeps, with the whole object; 1: no crops.
    )
    # Share of a split's examples that may be unusable (damaged pictures, empty masks); they are left out and counted.
    data.max_bad_share = 0.01
    data.workers = 0  # Batches decoded at the same time; 0: one per core.
    data.prefetch = 2  # Batches prepared ahead.

    c.model = model = ConfigDict()
    model.name = "magnet"  # Or 'lavt', whose fields configs/lavt_refcoco.py leaves.
    model.dtype = "float32"  # Of the computation, or 'bfloat16'; parameters and statistics are float32.
    # The Cross-modal Alignment Module; False: plain PWAM fusion, words never see the image.
    model.alignment = True
    model.pyramids = (1, 2, 3, 6)  # Its granularities.
    model.fusion_heads = (1, 1, 1, 1)  # Heads of the pixel-word attention, by stage.
    model.fusion_dropout = 0.0
    model.language_fusion = "masked"  # 'released' is what the published weights need.
    # Parts that the backward pass computes again instead of keeping them in memory: some of 'stage_1' (the largest) to
    # 'stage_4', 'text', 'decoder'; the policy is 'nothing' (is kept but inputs of blocks) or 'dots' (results of linear
    # layers, too).
    model.remat = ()
    model.remat_policy = "nothing"
    # Rows of layers in the pixel decoder, the mask predictor and Swin: 'scan', loops (and in training all pyramids at once),
    # whose program is loaded sooner; 'unroll', one layer after the other in a longer program; 'auto', by the platform.
    model.layers = "auto"
    model.gate_init = "open"  # 'released': the published initial values, whose language gates never open.
    model.swin = swin = ConfigDict()  # Swin-B.
    swin.embed_dim = 128
    swin.depths = (2, 2, 18, 2)
    swin.heads = (4, 8, 16, 32)
    swin.window = 12
    swin.patch = 4
    swin.drop_path = 0.3  # Of the last block, rising linearly from 0.
    # How window attention is computed, with one result: 'heads', 'lanes' (for TPUs) or 'auto', by the platform.
    swin.attention = "auto"
    swin.position = False  # Add the absolute position to the patches; the published networks do without.
    model.bert = bert = ConfigDict()  # BERT-base-uncased.
    bert.vocab_size = 0  # 0: the tokenizer's.
    bert.hidden = 768
    bert.heads = 12
    bert.intermediate = 3072
    bert.splits = (3, 6, 9, 12)  # Layers done after each of the four parts.
    bert.max_positions = 512
    bert.dropout = 0.1
    model.pixel_decoder = decoder = ConfigDict()
    decoder.channels = 256
    decoder.layers = 4
    decoder.heads = 8
    decoder.points = 4  # Samples per query, head and level.
    decoder.feedforward = 1024
    decoder.groups = 32  # Of the group normalisation of its inputs.
    # 'auto': the fastest way on the platform; or 'gather' (the reference), 'dense', 'points', 'rows', 'windows'.
    decoder.sampling = "auto"
    model.mask_predictor = predictor = ConfigDict()
    predictor.layers = 9
    predictor.heads = 8
    predictor.feedforward = 2048

    # Imported weights to start from: directories that `python -m magnet_jax.pretrained` wrote.
    c.init = init = ConfigDict()
    init.magnet = init.lavt = ""  # A whole network, whose sizes it brings along,
    init.swin = init.bert = ""  # or its encoders.

    c.grounding_head = head = ConfigDict()  # The masked-word predictor, built when its loss has a weight.
    head.stage = 4  # Whose image features it reads: 1 (stride 4) to 4 (stride 32).
    head.layers = 4
    head.heads = 12
    head.intermediate = 3072
    head.dropout = 0.1

    c.loss = loss = ConfigDict()  # A weight of 0 removes a term and its computation.
    loss.bce = 5.0
    loss.dice = 5.0
    loss.class_ = 2.0  # Is there an object that the sentence means?
    loss.cross_entropy = 0.0  # Of the two classes of each pixel at full resolution: LAVT's loss,
    loss.class_weights = (0.9, 1.1)  # with these weights of background and object.
    loss.full_resolution = False  # Compare masks at the image's size, not the mask features' (stride 4).
    loss.grounding = 1.0  # Mask Grounding.
    loss.mask_ratio = 0.15  # Share of words that are masked,
    loss.mask_at_least_one = True  # but never none of a sentence.
    loss.mask_keep = 0.1  # Share of these that stay as they are instead of becoming [MASK].
    loss.mask_sentences = 1.0  # Share of the sentences in which words are masked; the others stay whole.
    loss.mask_id = -1  # Id of [MASK]; -1: the tokenizer's.
    # Segment from the sentence with masked words; False: from a clean forward pass of its own.
    loss.grounding_shared_pass = True
    loss.alignment = 1.0  # Pixel-to-pixel and pixel-to-text contrast.
    loss.alignment_stride = 8  # Pixels of the image per compared pixel.
    loss.alignment_block = 0  # Rows of the pixel-to-pixel similarity held at a time; 0: all.
    loss.tau_pixel = 0.1
    loss.tau_text = 0.1

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # Or 'muon': Muon for the linear layers, Adam for the rest; not for 'fsdp'.
    # Smaller side, in channels, of the largest matrices that Muon moves; 0: no limit.
    optimizer.muon_largest = 0
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
    # Move as one vector, whole on every device, all that Adam moves, not only small arrays: for small networks faster.
    optimizer.flatten = False
    optimizer.clip_norm = 1.0  # Global norm that gradients are cut to; 0 for never.
    optimizer.lr_multipliers = ()  # ((expression, factor), ...): the first found in a name scales its learning rate.

    c.train = train = ConfigDict()
    train.steps = 0  # 0: as many as `epochs` say.
    train.epochs = 40
    train.accumulate = 1  # Parts that a batch is taken in, one after another, to save memory.
    train.ema = 0.0  # Decay of a running mean of the parameters, which is then what is evaluated; 0 for none.
    train.log_every = 50  # Steps between log lines.
    train.eval_every = 2000  # Steps between evaluations of the monitor split; 0 for only at the end.

    c.eval = evaluation = ConfigDict()
    evaluation.batch_size = 32
    evaluation.protocols = ("squash", "original", "gres")
    evaluation.monitor_examples = 1000  # Of the monitor split while training, evenly spread; 0 for all.
    evaluation.examples = 0  # Of every split at the end and by --mode=eval, evenly spread; 0 for all.
    evaluation.shuffled_text = True  # Also the floor: the same model given other pairs' sentences.
    evaluation.per_expression = False  # Also expressions/SPLIT.csv: ids, sentence, I, U and IoU of every one.
    evaluation.panels = 8  # Pictures (image, truth, prediction) per split.

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 2000
    checkpoint.keep = 2  # Latest ones; the best one stays too.
    checkpoint.best_metric = "squash/oIoU"  # 'protocol/figure' on the monitor split; higher is better.
    checkpoint.load = "latest"  # What --mode=eval and --mode=predict read: 'latest' or 'best'.

    # 'jit' over the mesh below, or 'pmap': the same step, data-parallel, by the older transformation.
    c.parallelism = "jit"
    # Named axes of the device mesh; -1: all devices that are left. Batches are split over 'data' and 'fsdp'.
    c.mesh = (("data", -1),)
    # ((expression, tactic), ...) by parameter name: 'replicate', or the axis to split the largest dimension over; 'fsdp'
    # means 'data' where there is no such axis.
    c.sharding = ((".*", "replicate"),)
    return c
