"""Training data: from files, folders and Hub datasets to packed blocks of tokens.

`prepare_data` is the way in; `show_data` prints what the model will see.
"""

from graftlm.training.data.collate import Collator
from graftlm.training.data.prepare import PreparedData, prepare_data
from graftlm.training.data.show import show_data, statistics_table
from graftlm.training.data.statistics import DataStatistics, SourceStatistics

__all__ = [
    "Collator",
    "DataStatistics",
    "PreparedData",
    "SourceStatistics",
    "prepare_data",
    "show_data",
    "statistics_table",
]
