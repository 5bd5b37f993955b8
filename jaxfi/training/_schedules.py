"""Learning rates by epoch, as torch.optim.lr_scheduler computes them."""

from __future__ import annotations

import math
from typing import NamedTuple


def step_decay(learning_rate: float, epoch: int, every: int, gamma: float) -> float:
    """torch StepLR: × `gamma` every `every` epochs; `epoch` counts from 0.

    >>> [step_decay(1.0, epoch, every=3, gamma=0.5) for epoch in (0, 2, 3, 6)]
    [1.0, 1.0, 0.5, 0.25]
    """
    return learning_rate * gamma ** (epoch // every)


def cosine_annealing(learning_rate: float, epoch: int, t_max: int, minimum: float = 0.0) -> float:
    """torch CosineAnnealingLR: half a cosine from `learning_rate` to `minimum` in `t_max` epochs.

    >>> [round(cosine_annealing(1.0, epoch, t_max=4), 3) for epoch in (0, 2, 4)]
    [1.0, 0.5, 0.0]
    """
    return minimum + (learning_rate - minimum) * (1 + math.cos(math.pi * epoch / t_max)) / 2


class PlateauState(NamedTuple):
    """What reduce-on-plateau remembers between epochs."""

    learning_rate: float
    best: float = math.inf
    bad_epochs: int = 0


def reduce_on_plateau(
    state: PlateauState,
    metric: float,
    *,
    factor: float = 0.1,
    patience: int = 3,
    threshold: float = 1e-3,
    minimum: float = 0.0,
) -> PlateauState:
    """torch ReduceLROnPlateau (mode min, relative threshold), after an epoch ended in `metric`.

    `patience` bad epochs in a row are tolerated; the next one multiplies the rate by `factor`.
    optax.contrib.reduce_on_plateau cuts one epoch earlier.

    >>> state = PlateauState(1.0)
    >>> for loss in (1.0, 1.0, 1.0, 1.0, 1.0):  # the first is the best, then four bad ones
    ...     state = reduce_on_plateau(state, loss, patience=3)
    >>> state
    PlateauState(learning_rate=0.1, best=1.0, bad_epochs=0)
    """
    if metric < state.best * (1 - threshold):
        return PlateauState(state.learning_rate, metric, 0)
    if state.bad_epochs < patience:
        return state._replace(bad_epochs=state.bad_epochs + 1)
    reduced = max(state.learning_rate * factor, minimum)
    # PyTorch leaves the rate alone where the change would be lost in rounding.
    changed = state.learning_rate - reduced > 1e-8
    return state._replace(learning_rate=reduced if changed else state.learning_rate, bad_epochs=0)
