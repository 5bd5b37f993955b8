"""Training with the default loss or with gradient regularization."""

from __future__ import annotations

from jaxfi.training.config import TrainConfig
from jaxfi.training.loop import EpochRecord, TrainResult, train
from jaxfi.training.optimizers import OPTIMIZERS, make_optimizer
from jaxfi.training.regularization import penalized_loss, penalized_value_and_grad

__all__ = [
    "OPTIMIZERS",
    "EpochRecord",
    "TrainConfig",
    "TrainResult",
    "make_optimizer",
    "penalized_loss",
    "penalized_value_and_grad",
    "train",
]
