"""Two-stage training: teacher, then student."""

from mmkd.training.checkpoint import CheckpointError
from mmkd.training.incremental import update
from mmkd.training.run_folder import RunError
from mmkd.training.stage import TrainingError
from mmkd.training.trainer import RunResult, train

__all__ = ["CheckpointError", "RunError", "RunResult", "TrainingError", "train", "update"]
