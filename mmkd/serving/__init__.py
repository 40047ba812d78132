"""What happens after training: recommendations from a run folder, and its tables in other formats."""

from mmkd.serving.batch import Written, read_item_list, recommend_file
from mmkd.serving.explain import Explainer, Reason, load_explainer
from mmkd.serving.export import FORMATS, ExportError, Tables, export, load_export
from mmkd.serving.recommend import Recommendation, Recommender, RunLoadError, load

__all__ = [
    "FORMATS",
    "Explainer",
    "ExportError",
    "Reason",
    "Recommendation",
    "Recommender",
    "RunLoadError",
    "Tables",
    "Written",
    "export",
    "load",
    "load_explainer",
    "load_export",
    "read_item_list",
    "recommend_file",
]
