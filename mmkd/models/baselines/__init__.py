"""Baselines without training: popularity and item-based nearest neighbours."""

from mmkd.models.baselines.item_knn import ItemKNN
from mmkd.models.baselines.popularity import Popularity

__all__ = ["ItemKNN", "Popularity"]
