"""Everything before the device: sources of records, masks, tokens, batches."""

from input_pipeline.loader import Loader
from input_pipeline.records import DataError, Record, Records, load, splits
from input_pipeline.tokenizer import Tokenizer

__all__ = ["DataError", "Loader", "Record", "Records", "Tokenizer", "load", "splits"]
