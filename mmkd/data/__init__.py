"""Interactions and item features: loaders, splits, sampling, the demo data set and the generator."""

from .dataset import Dataset
from .demo import load_demo
from .errors import DataError, DataWarning
from .loading import load
from .sampling import Batch, Sampler
from .summary import describe
from .synthesis import synthetic

__all__ = [
    "Batch",
    "DataError",
    "DataWarning",
    "Dataset",
    "Sampler",
    "describe",
    "load",
    "load_demo",
    "synthetic",
]
