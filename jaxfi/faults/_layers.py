"""Which layer a leaf belongs to, by its path, however its owner names parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LayerOf = Callable[[str], str]  # the path of a leaf to the name of its layer


def layer_of(path: str) -> str:
    """The layer that holds the leaf; a leaf without one is its own layer.

    Flax names leaves `conv1/kernel`, PyTorch's state dict `conv1.weight`, NNX `conv1/kernel/value`,
    a list of (weights, bias) `0/1`.

    >>> [layer_of(path) for path in ("conv1/kernel", "conv1.weight", "conv1/kernel/value", "0/1")]
    ['conv1', 'conv1', 'conv1', '0']
    >>> layer_of("scale")
    'scale'
    """
    path = path.removesuffix("/value") or path
    above, slash, name = path.rpartition("/")
    module, dot, _ = name.rpartition(".")
    return above + slash + module if dot and module else above or path


def layers_of(paths: Sequence[str], layer_name: LayerOf | None = None) -> list[str]:
    """The layer of each leaf, by `layer_name` or as `layer_of` says."""
    return [str((layer_name or layer_of)(path)) for path in paths]
