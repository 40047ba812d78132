"""Interactions and item features: loaders, splits, sampling, the demo data set and the generator."""

from .convert import CONVERTERS, convert
from .dataset import Dataset
from .demo import load_demo
from .errors import DataError, DataWarning
from .loading import load, load_configured
from .rows import from_rows, from_tuples
from .sampling import Batch, Sampler
from .summary import describe
from .synthesis import synthetic

__all__ = [
    "CONVERTERS",
    "Batch",
    "DataError",
    "DataWarning",
    "Dataset",
    "Sampler",
    "convert",
    "describe",
    "from_rows",
    "from_tuples",
    "load",
    "load_configured",
    "load_demo",
    "synthetic",
]
