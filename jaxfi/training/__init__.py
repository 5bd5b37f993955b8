"""Training with the default loss or with gradient regularization, as PyTorch trains.

In: a Flax module, a `Dataset`, a `TrainConfig`. Out: a `TrainResult`, variables and history, in
memory and as checkpoints; many members together (`train_sweep`); the sharpness of the minimum.
"""

from __future__ import annotations

from jaxfi.data._extras import extra

with extra("train"):
    from jaxfi.training._checkpoint import (
        has_checkpoint,
        load_checkpoint,
        load_variables,
        save_checkpoint,
    )
    from jaxfi.training._config import TrainConfig
    from jaxfi.training._convolution import with_matmul_convolutions
    from jaxfi.training._history import EpochRecord
    from jaxfi.training._loop import TrainResult, split, train
    from jaxfi.training._optimizers import OPTIMIZERS, make_optimizer
    from jaxfi.training._regularization import penalized_loss, penalized_value_and_grad
    from jaxfi.training._sharpness import LossSurface, loss_surface
    from jaxfi.training._sweep import NUMBERS, Member, train_sweep

__all__ = [
    "NUMBERS",
    "OPTIMIZERS",
    "EpochRecord",
    "LossSurface",
    "Member",
    "TrainConfig",
    "TrainResult",
    "has_checkpoint",
    "load_checkpoint",
    "load_variables",
    "loss_surface",
    "make_optimizer",
    "penalized_loss",
    "penalized_value_and_grad",
    "save_checkpoint",
    "split",
    "train",
    "train_sweep",
    "with_matmul_convolutions",
]
