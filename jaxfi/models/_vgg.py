"""VGG for 32×32 images, with BatchNorm and dense layers of 512; layer names as torchvision's."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxfi.models._layers import BatchNorm, convolution, dense, max_pool


class Features(nn.Module):
    """Convolutions, each with bias, BatchNorm and ReLU; every stage ends in a 2×2 max-pool."""

    stages: tuple[tuple[int, ...], ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        number = 0  # in torch.nn.Sequential, which counts ReLUs and pools too
        for stage in self.stages:
            for width in stage:
                x = convolution(x, width, use_bias=True, name=f"{number}")
                x = nn.relu(BatchNorm(name=f"{number + 1}")(x, train))
                number += 3
            x = max_pool(x, 2)
            number += 1
        return x


class Classifier(nn.Module):
    """Two dense layers of 512 with ReLU and dropout, and a last one of `num_classes`."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for name in ("0", "3"):
            x = nn.relu(dense(x, 512, name=name))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return dense(x, self.num_classes, name="6")


class VGG(nn.Module):
    """Stages of 3×3 convolutions of the given widths, then the classifier."""

    stages: tuple[tuple[int, ...], ...]
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[B, 32, 32, C]` to logits `[B, num_classes]`; training needs a "dropout" key."""
        x = Features(self.stages, name="features")(x, train)
        x = x.reshape(x.shape[0], -1)
        return Classifier(self.num_classes, name="classifier")(x, train)


def vgg11(num_classes: int = 10) -> VGG:
    """9,756,426 parameters with 3 input channels, 9,755,274 with 1."""
    return VGG(((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2), num_classes)


def vgg16(num_classes: int = 10) -> VGG:
    """15,253,578 parameters with 3 input channels, 15,252,426 with 1."""
    return VGG(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), num_classes)
