"""Residual networks for 32×32 images: ResNet18, ResNet9, and the CIFAR family 20, 32, 44.

Layer names are those of the PyTorch networks that the studies trained: `conv1`, `bn1`,
`layer1/0/conv1`, `layer2/0/shortcut/0`, `linear`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxfi.models._layers import BatchNorm, convolution, dense, max_pool


class Projection(nn.Module):
    """Shortcut with parameters: 1×1 convolution and BatchNorm."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = convolution(x, self.features, size=1, stride=self.stride, padding=0, name="0")
        return BatchNorm(name="1")(x, train)


def pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Shortcut without parameters: every `stride`-th pixel, zero channels added on both sides.

    Option A of He et al., "Deep Residual Learning for Image Recognition", 2015.
    """
    before = (features - x.shape[-1]) // 2
    after = features - x.shape[-1] - before
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (before, after)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, the shortcut added before the last ReLU."""

    features: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.project:
                shortcut = Projection(self.features, self.stride, name="shortcut")(x, train)
            else:
                shortcut = pad_shortcut(x, self.features, self.stride)
        x = convolution(x, self.features, stride=self.stride, name="conv1")
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        x = convolution(x, self.features, name="conv2")
        x = BatchNorm(name="bn2")(x, train)
        return nn.relu(x + shortcut)


class Stage(nn.Module):
    """Basic blocks `0`, `1`, … of one width; the first may have a stride."""

    num_blocks: int
    features: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for number in range(self.num_blocks):
            stride = self.stride if number == 0 else 1
            x = BasicBlock(self.features, stride, self.project, name=f"{number}")(x, train)
        return x


class ResNet(nn.Module):
    """3×3 stem, stages `layer1`, `layer2`, …, global average pool, dense layer.

    Attributes:
      widths: channels of each stage; the stem has those of the first.
      num_blocks: basic blocks of each stage.
      project: shortcuts between stages are 1×1 convolutions, else they are padded with zeros.
    """

    widths: tuple[int, ...]
    num_blocks: tuple[int, ...]
    project: bool
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[B, 32, 32, C]` to logits `[B, num_classes]`."""
        x = convolution(x, self.widths[0], name="conv1")
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        for number, (width, blocks) in enumerate(zip(self.widths, self.num_blocks, strict=True), 1):
            stride = 1 if number == 1 else 2
            x = Stage(blocks, width, stride, self.project, name=f"layer{number}")(x, train)
        return dense(x.mean((1, 2)), self.num_classes, name="linear")


def resnet18(num_classes: int = 10) -> ResNet:
    """11,173,962 parameters with 3 input channels, 11,172,810 with 1."""
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), True, num_classes)


def resnet20(num_classes: int = 10) -> ResNet:
    """269,722 parameters with 3 input channels, 269,434 with 1.

    The public CIFAR-10 weights (cad-polito-it/dnn-benchmarks) expect pixels in [0, 1], scaled by
    mean (.4914, .4822, .4465) and standard deviation (.2023, .1994, .2010).
    """
    return ResNet((16, 32, 64), (3, 3, 3), False, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    """464,154 parameters with 3 input channels, 463,866 with 1."""
    return ResNet((16, 32, 64), (5, 5, 5), False, num_classes)


def resnet44(num_classes: int = 10) -> ResNet:
    """658,586 parameters with 3 input channels, 658,298 with 1."""
    return ResNet((16, 32, 64), (7, 7, 7), False, num_classes)


def conv_block(x: jax.Array, number: int, features: int, train: bool) -> jax.Array:
    """3×3 convolution, BatchNorm and ReLU, in the calling module."""
    x = convolution(x, features, name=f"conv{number}")
    return nn.relu(BatchNorm(name=f"bn{number}")(x, train))


class ResidualPair(nn.Module):
    """Two times convolution, BatchNorm, ReLU; the input is added after the last ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = x
        for number in (1, 2):
            y = conv_block(y, number, x.shape[-1], train)
        return x + y


class ResNet9(nn.Module):
    """2,440,266 parameters with 3 input channels, 2,439,114 with 1."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[B, 32, 32, C]` to logits `[B, num_classes]`."""
        x = conv_block(x, 1, 64, train)
        x = max_pool(conv_block(x, 2, 128, train), 2)
        x = ResidualPair(name="res1")(x, train)
        x = max_pool(conv_block(x, 3, 256, train), 2)
        x = max_pool(conv_block(x, 4, 256, train), 2)
        x = ResidualPair(name="res2")(x, train)
        x = max_pool(x, 4)
        return dense(x.reshape(x.shape[0], -1), self.num_classes, name="linear")
