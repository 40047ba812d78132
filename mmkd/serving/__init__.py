"""What happens after training: recommendations from a run folder, and its tables in other formats."""

from mmkd.serving.export import FORMATS, ExportError, Tables, export, load_export
from mmkd.serving.recommend import Recommendation, Recommender, RunLoadError, load

__all__ = [
    "FORMATS",
    "ExportError",
    "Recommendation",
    "Recommender",
    "RunLoadError",
    "Tables",
    "export",
    "load",
    "load_export",
]
