"""Data from the command line: `python -m input_pipeline shapes|prepare|vocabulary|build_tfds|show|benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

# TensorFlow only reads data here; its start-up notes say nothing.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from input_pipeline import (
    benchmark,
    prepare,
    prepare_layout,
    refcoco_tfds,
    refer,
    shapes,
    writers,
)
from input_pipeline.records import DataError, load
from input_pipeline.shapes_describe import FLAVOURS, MIXED
from input_pipeline.tokenizer import learn_vocabulary
from magnet_jax.errors import UserError, config_error

_WRITERS = {"refer": writers.write_refer, "jsonl": writers.write_jsonl, "tfds": writers.write_tfds}
_REFER_SPLITS = ("train", "val", "testA", "testB")


def write_shapes(arguments: argparse.Namespace) -> None:
    """Makes the built-in data set and writes it in one of the forms that users have."""
    fields = {field.name for field in dataclasses.fields(shapes.Options)}
    options = {name: value for name, value in vars(arguments).items() if name in fields}
    names = shapes.splits() if arguments.format == "jsonl" else _REFER_SPLITS
    splits = {}
    with tqdm(names, "making splits", file=sys.stderr) as bar:
        for name in bar:
            splits[name] = load("shapes", name, seed=arguments.seed, scenes=arguments.scenes, **options)
    total = sum(map(len, splits.values()))
    with tqdm(total=total, desc="writing", unit=" sentences", file=sys.stderr) as bar:
        _WRITERS[arguments.format](splits, arguments.out, progress=lambda done: bar.update(done - bar.n))
    print(f"{total} sentences of {', '.join(names)} in '{arguments.out}'")


def build_tfds(arguments: argparse.Namespace) -> None:
    """Has TFDS's own builder prepare `ref_coco` of a folder that `prepare --tfds` wrote."""
    where = refcoco_tfds.build(arguments.root, arguments.manual, arguments.dataset, arguments.partition)
    print(f"{arguments.dataset} ({arguments.partition}) is in '{where}'")
    print(f"config.data: source = 'tfds', root = '{arguments.root}'")


def make_vocabulary(arguments: argparse.Namespace) -> None:
    """Writes a vocabulary of the words that one's own sentences have, for a training without BERT's."""
    from magnet_jax.workdir import write_atomically

    pieces = learn_vocabulary(load("jsonl", "train", root=arguments.root).texts, arguments.size)
    write_atomically(arguments.out, "\n".join(pieces) + "\n")
    print(f"{len(pieces)} pieces in '{arguments.out}'; use them with --config.data.vocab={arguments.out}")


def show(arguments: argparse.Namespace) -> None:
    """Draws what a network will see."""
    # A command line stands above both packages; the pipeline itself never imports the networks.
    from magnet_jax import visualize
    from magnet_jax.preview import preview
    from magnet_jax.workdir import write_atomically

    config = read_config(arguments.rest)
    split = arguments.split or config.data.split
    sheet, shown = preview(config, split, arguments.n)
    write_atomically(arguments.out, visualize.encode_png(sheet))
    print(f"{shown} examples of '{split}' in '{arguments.out}'")


def measure(arguments: argparse.Namespace) -> None:
    """Prints how fast examples come, or how fast a data set as large as RefCOCO starts."""
    if arguments.startup:
        lines = benchmark.start_up_report()
    else:
        config = read_config(arguments.rest) if arguments.rest else None
        lines = benchmark.throughput_report(config, arguments.batches, arguments.repeats)
    for line in lines:
        print(line, flush=True)


def read_config(rest: list[str]) -> ConfigDict:
    """The configuration of --config=FILE and --config.field=value; raises UserError for any other flag."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", None, "Experiment.", flag_values=values, sys_argv=["", *rest]
    )
    try:
        left = values(["", *rest])[1:]
        if left or holder.value is None:
            raise UserError(
                f"'{left[0]}' is not a flag" if left else "--config is missing; give configs/NAME.py"
            )
        getattr(holder.value, "seed", None)  # A configuration that did not load raises at its first use.
        return holder.value
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(config_error(error)) from error


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    top = argparse.ArgumentParser(prog="python -m input_pipeline", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    defaults = shapes.Options()

    command = commands.add_parser("shapes", help="write the built-in data set to disk")
    command.set_defaults(run=write_shapes)
    command.add_argument("--out", required=True, help="directory to write; must not exist or be empty")
    command.add_argument("--format", choices=_WRITERS, default="refer")
    command.add_argument(
        "--scenes", type=int, help="scenes of every split (default: those of the built-in set)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--image_size", type=positive, default=defaults.image_size)
    command.add_argument("--flavour", choices=(*FLAVOURS, MIXED), default=defaults.flavour)
    command.add_argument(
        "--expressions", type=positive, default=defaults.expressions, help="sentences per object"
    )
    command.add_argument(
        "--generalised", action="store_true", help="also sentences of no and several objects"
    )

    command = commands.add_parser("prepare", help="check data, say what is missing, and make it ready")
    command.set_defaults(run=prepare.run)
    command.add_argument("--root", default="data", help="folder of the data; of jsonl also the file")
    command.add_argument("--source", choices=prepare.SOURCES, default="refer")
    command.add_argument(
        "--dataset",
        action="append",
        choices=prepare_layout.PARTITIONS,
        help="repeatable (default: all there)",
    )
    command.add_argument("--partition", help="only this one (default: all there)")
    command.add_argument("--deep", action="store_true", help="look at every picture, mask and sentence")
    command.add_argument(
        "--tfds", metavar="DIR", help="also write the manual folder of TFDS's ref_coco there"
    )

    command = commands.add_parser("vocabulary", help="make a vocabulary of the words of one's own list")
    command.set_defaults(run=make_vocabulary)
    command.add_argument("--root", required=True, help="the .jsonl file, or the folder of a data.jsonl")
    command.add_argument("--size", type=positive, default=8000, help="pieces at most")
    command.add_argument("--out", default="vocab.txt")

    command = commands.add_parser(
        "build_tfds", help="have TFDS prepare ref_coco of what prepare --tfds wrote"
    )
    command.set_defaults(run=build_tfds)
    command.add_argument("--manual", required=True, help="folder with refcoco.json and coco_train2014")
    command.add_argument("--root", required=True, help="TFDS's data_dir, where the result goes")
    command.add_argument("--dataset", choices=refer.PARTITIONS, default="refcoco")
    command.add_argument("--partition", default="unc")

    command = commands.add_parser(
        "show", help="draw what a network will see; also takes --config.field=value"
    )
    command.set_defaults(run=show)
    command.add_argument("--split", help="default: the one that is trained on")
    command.add_argument("--n", type=positive, default=16, help="examples")
    command.add_argument("--out", default="grid.png")

    command = commands.add_parser(
        "benchmark",
        help="measure the speed of a configuration's data, without --config of pictures of COCO's size",
    )
    command.set_defaults(run=measure)
    command.add_argument("--batches", type=positive, default=60)
    command.add_argument("--repeats", type=positive, default=3)
    command.add_argument(
        "--startup", action="store_true", help="instead, time and memory to start on as much as RefCOCO"
    )
    return top


def positive(text: str) -> int:
    """A number of a flag that is at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected 1 or more")
    return value


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 1 and one line on stderr where it cannot."""
    arguments, rest = parser().parse_known_args(argv)
    arguments.rest = rest
    try:
        if arguments.rest and arguments.run not in (show, measure):
            raise UserError(f"'{arguments.rest[0]}' is not a flag of this command")
        arguments.run(arguments)
    except (DataError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
