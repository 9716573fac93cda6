"""Data from the command line: `python -m input_pipeline shapes --out=DIR --format=refer|jsonl`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from tqdm import tqdm

from input_pipeline import shapes, writers
from input_pipeline.records import DataError, load
from input_pipeline.shapes_describe import FLAVOURS, MIXED

_WRITERS = {"refer": writers.write_refer, "jsonl": writers.write_jsonl}
_REFER_SPLITS = ("train", "val", "testA", "testB")


def write_shapes(arguments: argparse.Namespace) -> None:
    """Makes the built-in data set and writes it in one of the forms that users have."""
    fields = {field.name for field in dataclasses.fields(shapes.Options)}
    options = {name: value for name, value in vars(arguments).items() if name in fields}
    names = _REFER_SPLITS if arguments.format == "refer" else shapes.splits()
    splits = {}
    with tqdm(names, "making splits", file=sys.stderr) as bar:
        for name in bar:
            splits[name] = load("shapes", name, seed=arguments.seed, scenes=arguments.scenes, **options)
    total = sum(map(len, splits.values()))
    with tqdm(total=total, desc="writing", unit=" sentences", file=sys.stderr) as bar:
        _WRITERS[arguments.format](splits, arguments.out, progress=lambda done: bar.update(done - bar.n))
    print(f"{total} sentences of {', '.join(names)} in '{arguments.out}'")


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
    command.add_argument("--image_size", type=int, default=defaults.image_size)
    command.add_argument("--flavour", choices=(*FLAVOURS, MIXED), default=defaults.flavour)
    command.add_argument("--expressions", type=int, default=defaults.expressions, help="sentences per object")
    command.add_argument(
        "--generalised", action="store_true", help="also sentences of no and several objects"
    )
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 1 and one line on stderr where it cannot."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
