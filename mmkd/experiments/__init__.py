"""The paper's tables and figures, each from resumable cells: one training run a cell."""

from mmkd.experiments.figures import figure3, figure4, figure5
from mmkd.experiments.search import tune
from mmkd.experiments.tables import table4, table5, table6, table7, table8

EXPERIMENTS = {
    "search": tune,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
}

__all__ = ["EXPERIMENTS"]
