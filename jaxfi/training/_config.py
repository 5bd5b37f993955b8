"""What decides a training: its settings, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxfi.data._augment import AffineRanges, check_ranges
from jaxfi.training._optimizers import OPTIMIZERS, default_learning_rate
from jaxfi.training._regularization import FORMS
from jaxfi.training._schedules import PlateauState, cosine_annealing, reduce_on_plateau, step_decay

SCHEDULES = ("constant", "step", "cosine", "plateau")
CONVOLUTIONS = ("xla", "im2col")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training; defaults are the paper's for MNIST with the default loss."""

    epochs: int = 20
    batch_size: int = 64
    """An epoch's last, incomplete batch is left out; which images it holds changes by epoch."""
    optimizer: str = "adadelta"
    learning_rate: float | None = None
    """None is PyTorch's default for the optimizer."""
    weight_decay: float = 0.0
    """L2, added to the gradient."""
    alpha: float = 0.0
    """Weight of the penalty ‖∇L‖²; 0 is the default loss."""
    schedule: str = "step"
    gamma: float = 0.7
    """Factor of "step"."""
    decay_every: int = 3
    """Epochs between two cuts of "step"."""
    t_max: int | None = None
    """Epochs of half a cosine of "cosine"; None is all."""
    factor: float = 0.1
    """Factor of "plateau", which watches the test loss, as the study did, or `held_out`."""
    patience: int = 3
    """Bad epochs that "plateau" tolerates."""
    threshold: float = 1e-3
    """Relative improvement that "plateau" counts as one."""
    held_out: float = 0.0
    """Share of the training images, the last ones, that are not trained on: "plateau" watches their
    loss in place of the test images'."""
    augment: AffineRanges | None = AffineRanges()
    """None leaves the images as they are."""
    seed: int = 0
    convolution: str = "auto"
    """"xla", "im2col", or "auto": the faster one by measurement."""
    derivative: str = "auto"
    """Of the penalty: "fast", "plain", or "auto": the faster one by measurement."""
    test_batch_size: int = 500
    checkpoint_every: float = 60.0
    """Seconds between checkpoints; the end of the training always has one."""

    def validate(self) -> None:
        """Raises ValueError, in one line, for the first setting that is not allowed."""
        for name, names in _NAMES.items():
            self._require(name, getattr(self, name) in names, ", ".join(names))
        for name in ("epochs", "batch_size", "decay_every", "test_batch_size"):
            self._require(name, getattr(self, name) >= 1, "integers >= 1")
        for name in ("weight_decay", "alpha", "threshold", "patience", "checkpoint_every"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "finite numbers >= 0")
        for name in ("learning_rate", "gamma", "factor", "t_max"):
            value = getattr(self, name)
            positive = value is None or (math.isfinite(value) and value > 0)
            self._require(name, positive, "finite numbers > 0")
        # JAX takes the low 32 bits: a larger seed would be another one in disguise.
        self._require("seed", 0 <= self.seed < 2**32, "integers >= 0 and < 2**32")
        self._require("held_out", 0 <= self.held_out < 1, "numbers from 0 to below 1")
        if self.augment is not None:
            check_ranges(self.augment)

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")


_NAMES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "convolution": ("auto", *CONVOLUTIONS),
    "derivative": ("auto", *FORMS),
}


def learning_rate_of_epoch(config: TrainConfig, epoch: int, losses: Sequence[float]) -> float:
    """The learning rate of `epoch`, from 0, given the losses that "plateau" watched before it."""
    first = config.learning_rate
    if first is None:
        first = default_learning_rate(config.optimizer)
    if config.schedule == "step":
        return step_decay(first, epoch, config.decay_every, config.gamma)
    if config.schedule == "cosine":
        return cosine_annealing(first, epoch, config.t_max or config.epochs)
    if config.schedule == "plateau":
        return _plateau(config, first, losses)
    return first


def _plateau(config: TrainConfig, first: float, losses: Sequence[float]) -> float:
    # Replayed from the history, so that there is no state to keep in a checkpoint.
    state = PlateauState(first)
    for loss in losses:
        state = reduce_on_plateau(
            state,
            loss,
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
        )
    return state.learning_rate
