"""Everything before the device: sources of records, masks, tokens, batches."""

from input_pipeline.augment import Augmentation
from input_pipeline.loader import Loader
from input_pipeline.records import DataError, Record, Records, load, load_split, splits
from input_pipeline.tokenizer import Tokenizer

__all__ = [
    "Augmentation",
    "DataError",
    "Loader",
    "Record",
    "Records",
    "Tokenizer",
    "load",
    "load_split",
    "splits",
]
