"""mmkd: small recommenders from interactions plus item content, by multi-modal knowledge distillation."""

__version__ = "0.1.0"

from mmkd import _library as _library  # first: without the compiled library there is no package
from mmkd import losses, ops
from mmkd.graph import BipartiteGraph

__all__ = ["BipartiteGraph", "__version__", "load", "losses", "ops", "train", "update"]


def __getattr__(name: str):
    # Training and serving bring pandas-sized imports; kernel users should not pay for them.
    if name == "train":
        from mmkd.training import train

        return train
    if name == "update":
        from mmkd.training import update

        return update
    if name == "load":
        from mmkd.serving import load

        return load
    raise AttributeError(f"module 'mmkd' has no attribute {name!r}")
