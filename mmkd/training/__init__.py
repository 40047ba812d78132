"""Two-stage training: teacher, then student."""

from mmkd.training.checkpoint import CheckpointError
from mmkd.training.incremental import update
from mmkd.training.loggers import Logger
from mmkd.training.run_folder import RunError
from mmkd.training.stage import TrainingError
from mmkd.training.stop import RunStopped, Stop, stop_on_signals
from mmkd.training.trainer import RunResult, train

__all__ = [
    "CheckpointError",
    "Logger",
    "RunError",
    "RunResult",
    "RunStopped",
    "Stop",
    "TrainingError",
    "stop_on_signals",
    "train",
    "update",
]
