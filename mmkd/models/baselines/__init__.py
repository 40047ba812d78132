"""Everything MMKD is compared with: one file a model, one line here; `mmkd train --model NAME` takes these names."""

from mmkd.models.baselines.base import Baseline, BaselineConfig
from mmkd.models.baselines.bm3 import BM3
from mmkd.models.baselines.bpr_mf import BPRMF
from mmkd.models.baselines.clcrec import CLCRec
from mmkd.models.baselines.grcn import GRCN
from mmkd.models.baselines.item_knn import ItemKNN
from mmkd.models.baselines.lattice import LATTICE
from mmkd.models.baselines.mmgcn import MMGCN
from mmkd.models.baselines.ngcf import NGCF
from mmkd.models.baselines.popularity import Popularity
from mmkd.models.baselines.slmrec import SLMRec
from mmkd.models.baselines.vbpr import VBPR

TRAINED: dict[str, type[Baseline]] = {
    "bpr-mf": BPRMF,
    "ngcf": NGCF,
    "vbpr": VBPR,
    "mmgcn": MMGCN,
    "grcn": GRCN,
    "lattice": LATTICE,
    "clcrec": CLCRec,
    "slmrec": SLMRec,
    "bm3": BM3,
}
COUNTED = {"popularity": Popularity, "item-knn": ItemKNN}
OWN = ("lightgcn", "teacher", "mmkd")
NAMES = (*COUNTED, "lightgcn", *TRAINED, "teacher", "mmkd")

TITLES = {
    "popularity": "popularity", "item-knn": "item-knn", "lightgcn": "LightGCN", "bpr-mf": "BPR-MF", "ngcf": "NGCF",
    "vbpr": "VBPR", "mmgcn": "MMGCN", "grcn": "GRCN", "lattice": "LATTICE", "clcrec": "CLCRec", "slmrec": "SLMRec",
    "bm3": "BM3", "teacher": "teacher", "mmkd": "MMKD student",
}  # fmt: skip

__all__ = ["COUNTED", "NAMES", "OWN", "TITLES", "TRAINED", "Baseline", "BaselineConfig", "ItemKNN", "Popularity"]
