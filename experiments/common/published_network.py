"""A published network and its images, for what injects faults into it: settings, flags, loading."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxfi.convert import from_torch, load_state
from jaxfi.data import load_dataset, normalise
from jaxfi.engine import ENGINES
from jaxfi.models import MODELS, PyTree, evaluation_function
from jaxfi.network import with_arithmetic
from jaxfi.outcomes import NAN_POLICIES


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """What decides network, images and campaign; the flags have these names and say more."""

    network: str
    weights: str
    dataset: str
    mean: list[float]
    std: list[float]
    num_faults: int
    paths: str
    bits: list[int]
    num_images: int
    jpeg_quality: int
    nan: str
    engine: str
    batch_size: int
    seed: int


def define_network_flags(values: flags.FlagValues) -> None:
    """The flags of `NetworkSettings` but num_faults, and --workdir."""
    text: Any = functools.partial(flags.DEFINE_string, flag_values=values)
    number: Any = functools.partial(flags.DEFINE_integer, flag_values=values)
    choice: Any = functools.partial(flags.DEFINE_enum, flag_values=values)
    numbers: Any = functools.partial(flags.DEFINE_list, flag_values=values)
    text("workdir", None, "Folder of the results; the same again continues.")
    text("weights", None, "PyTorch state dict of the network: .npz, .safetensors, .pt or .onnx.")
    text("network", "resnet20", "Network: a name in jaxfi.models.MODELS.")
    text("dataset", "cifar10", "Its test images are used: digits, mnist or cifar10.")
    numbers("mean", ["0.4914", "0.4822", "0.4465"], "Of pixels in [0, 1], per channel.")
    numbers("std", ["0.2023", "0.1994", "0.2010"], "Of pixels in [0, 1], per channel.")
    text("paths", "*", "Pattern of the leaves that get faults: layer3/*.")
    numbers("bits", [], "Bit positions that get faults, comma-separated; none is all.")
    number("num_images", 0, "Test images, the first ones; 0 is all.", 0)
    number("jpeg_quality", 0, "Compress the images again at this quality; 0: do not.", 0, 95)
    choice("nan", "argmax", NAN_POLICIES, "What a NaN output counts as.")
    choice("engine", "fast", tuple(ENGINES), "Campaign engine.")
    number("batch_size", 100, "Images per batch.", 1)
    number("seed", 0, "Seed of the faults drawn.", 0, 2**32 - 1)


def given_settings(kind: type, values: flags.FlagValues, files: Sequence[str]) -> dict[str, Any]:
    """What the flags say of the fields of `kind`, a `NetworkSettings`.

    Raises ValueError for one of the `files` that is not named, and for numbers that are none.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {name: values[name].value for name in names}
    for name in files:
        if not given[name]:
            raise ValueError(f"--{name} is missing: give the reference file")
    for name, kind_of_number in (("mean", float), ("std", float), ("bits", int)):
        given[name] = [kind_of_number(number) for number in given[name]]
    return given


class Subject(NamedTuple):
    """What faults are injected into.

    Attributes:
      apply_fn: maps parameters and images [batch, H, W, C] to logits.
      params: the parameters.
      images: [N, H, W, C] float32, normalised.
      labels: [N] int32.
      note: where the images come from.
    """

    apply_fn: Callable[[PyTree, jax.Array], jax.Array]
    params: PyTree
    images: np.ndarray
    labels: np.ndarray
    note: str


def load_subject(settings: Any) -> Subject:
    """Network and images. Raises ValueError or FileNotFoundError for files that do not fit."""
    if settings.network not in MODELS:
        allowed = ", ".join(MODELS)
        raise ValueError(f"network is {settings.network!r}; allowed: {allowed}")
    state = load_state(settings.weights)
    dataset = load_dataset(settings.dataset)
    _check_images(settings, dataset.test_images.shape)
    module = MODELS[settings.network](num_classes=dataset.num_classes)
    image = jnp.zeros((1, *dataset.test_images.shape[1:]), jnp.float32)
    variables = from_torch(state, jax.eval_shape(module.init, jax.random.key(0), image))
    count = settings.num_images or len(dataset.test_labels)
    pixels = compress(dataset.test_images[:count], settings.jpeg_quality)
    images = normalise(pixels, settings.mean, settings.std)
    apply_fn = evaluation_function(module, variables)
    return Subject(apply_fn, variables["params"], images, dataset.test_labels[:count], dataset.note)


def _check_images(settings: Any, shape: tuple[int, ...]) -> None:
    if settings.num_images > shape[0]:
        raise ValueError(f"--num_images={settings.num_images}: allowed are 0 (all) to {shape[0]}")
    for name in ("mean", "std"):
        if len(getattr(settings, name)) != shape[-1]:
            raise ValueError(f"--{name} has not {shape[-1]} numbers, one a channel of the images")
    if settings.jpeg_quality and shape[-1] != 3:
        raise ValueError("--jpeg_quality is for images of 3 channels")


def compress(images: np.ndarray, quality: int) -> np.ndarray:
    """The images [N, H, W, 3] uint8 after one more JPEG compression; 0 leaves them."""
    if quality == 0:
        return images
    from PIL import Image

    compressed = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        compressed.append(np.asarray(Image.open(file)))
    return np.stack(compressed)


def check_arithmetic(subject: Subject, arithmetic: Mapping[str, str]) -> Callable:
    """The network under the arithmetic, traced once: an error shows before any work."""
    apply_fn = with_arithmetic(subject.apply_fn, arithmetic)
    jax.eval_shape(apply_fn, subject.params, subject.images[:1])
    return apply_fn
