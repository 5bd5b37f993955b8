"""The studied networks as Flax modules, with PyTorch's layer names, defaults and arithmetic.

Every one takes images `[B, 32, 32, C]` (C = 1 or 3) and returns logits `[B, num_classes]`. A path
in the variables is the PyTorch name with `/` for `.`: `layer3/0/conv1/kernel` is
`layer3.0.conv1.weight`, so the pattern `layer3/*` selects a stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxfi.data._extras import extra
from jaxfi.faults import PyTree

with extra("train"):
    from flax import linen as nn

    from jaxfi.models._lenet import LeNet
    from jaxfi.models._resnet import ResNet, ResNet9, resnet18, resnet20, resnet32, resnet44
    from jaxfi.models._vgg import VGG, vgg11, vgg16

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet9": ResNet9,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "vgg11": vgg11,
    "vgg16": vgg16,
}


def evaluation_function(
    module: nn.Module, variables: PyTree
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """`apply_fn(params, images) -> logits` in evaluation mode, as `jaxfi.run_campaign` takes it.

    What `variables` holds beside "params", such as running statistics, is held fixed.
    """
    statistics = {name: tree for name, tree in variables.items() if name != "params"}

    def apply_fn(params: PyTree, images: jax.Array) -> jax.Array:
        outputs: Any = module.apply({"params": params, **statistics}, images, train=False)
        return outputs

    return apply_fn


__all__ = [
    "MODELS",
    "VGG",
    "LeNet",
    "ResNet",
    "ResNet9",
    "evaluation_function",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "vgg11",
    "vgg16",
]
