"""The sides of `experiments.benchmarks.engine`: one network in JAX and in PyTorch, and their runs.

`settings` is `experiments.benchmarks.engine.Settings`.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxfi.campaign import Campaign, run_campaign
from jaxfi.convert import FLATTENED, from_torch, load_state, to_torch, to_torch_layout, torch_name
from jaxfi.data import load_dataset, normalise
from jaxfi.faults import FaultList, inject
from jaxfi.models import MODELS, PyTree, evaluation_function
from jaxfi.outcomes import CRITICAL, MASKED, NON_CRITICAL
from jaxfi.training import load_variables
from tests.torch_models import TORCH_MODELS

RANDOM = "random"
NUM_CLASSES = 10


class Subject(NamedTuple):
    """What faults are injected into, on both sides.

    Attributes:
      apply_fn: maps parameters and images [batch, H, W, C] to logits.
      variables: parameters, and running statistics where the network has them.
      model: the same network and weights in PyTorch, on `device`.
      images: [N, H, W, C] float32; labels: [N] int32.
      note: where the images come from.
      device: PyTorch's.
    """

    apply_fn: Callable[[PyTree, jax.Array], jax.Array]
    variables: PyTree
    model: torch.nn.Module
    images: np.ndarray
    labels: np.ndarray
    note: str
    device: torch.device


def load_subject(settings: Any) -> Subject:
    """Raises ValueError or FileNotFoundError for files that are absent or do not fit."""
    images, labels, note = load_images(settings)
    module = MODELS[settings.network](num_classes=NUM_CLASSES)
    variables = load_weights(settings, module, images)
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = TORCH_MODELS[settings.network](NUM_CLASSES, in_channels=images.shape[-1])
    state = {name: torch.from_numpy(array) for name, array in to_torch(variables).items()}
    model.load_state_dict(state, strict=False)  # num_batches_tracked is PyTorch's own
    apply_fn = evaluation_function(module, variables)
    return Subject(apply_fn, variables, model.eval().to(device), images, labels, note, device)


def load_images(settings: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """Normalised images [N, 32, 32, C] float32, labels [N] int32, and where they come from."""
    if settings.dataset == RANDOM:
        generator = np.random.default_rng(settings.seed)
        shape = (settings.num_images, 32, 32, settings.channels)
        labels = generator.integers(0, NUM_CLASSES, settings.num_images).astype(np.int32)
        return generator.standard_normal(shape, np.float32), labels, "normal noise"
    dataset = load_dataset(settings.dataset)
    count = settings.num_images or len(dataset.test_labels)
    if count > len(dataset.test_labels):
        available = len(dataset.test_labels)
        raise ValueError(f"--num_images is {count}; {settings.dataset} has {available}")
    images = normalise(dataset.test_images[:count], dataset.mean, dataset.std)
    return images, dataset.test_labels[:count], dataset.note


def load_weights(settings: Any, module: Any, images: np.ndarray) -> PyTree:
    """Variables of a checkpoint folder or a PyTorch state dict, or the initial ones."""
    image = jnp.zeros((1, *images.shape[1:]), jnp.float32)
    if not settings.weights:
        return jax.jit(module.init)(jax.random.key(settings.seed), image)
    if Path(settings.weights).is_dir():
        variables = load_variables(settings.weights)
        return from_torch(to_torch(variables), _like(module, image))
    return from_torch(load_state(settings.weights), _like(module, image))


def _like(module: Any, image: jax.Array) -> PyTree:
    return jax.eval_shape(module.init, jax.random.key(0), image)


def run_jaxfi(settings: Any, subject: Subject, faults: FaultList) -> tuple[float, Campaign]:
    """Seconds of the whole campaign, from empty caches, and its result."""
    jax.clear_caches()
    start = time.perf_counter()
    campaign = run_campaign(
        subject.apply_fn, subject.variables["params"], faults, subject.images, subject.labels,
        nan="argmax", batch_size=settings.batch_size, precision=settings.precision,
        seed=settings.seed,
    )  # fmt: skip
    return time.perf_counter() - start, campaign


def run_pytorch(
    settings: Any, subject: Subject, faults: FaultList, num_images: int
) -> tuple[float, np.ndarray]:
    """Seconds of re-running every fault in a copy of the model, and outcomes [F, N] uint8."""
    pixels = torch.from_numpy(subject.images[:num_images].transpose(0, 3, 1, 2).copy())
    batches = pixels.to(subject.device).split(settings.batch_size)
    sites = torch_sites(faults)

    def forward(model: torch.nn.Module) -> np.ndarray:
        return torch.cat([model(batch) for batch in batches]).cpu().numpy()

    with torch.no_grad():
        golden = forward(subject.model)
        start = time.perf_counter()
        outcomes = [judge(golden, forward(with_fault(subject.model, *site))) for site in sites]
        return time.perf_counter() - start, np.stack(outcomes)


def torch_sites(faults: FaultList) -> list[tuple[str, int, int]]:
    """Each bit-flip as PyTorch's parameter name, flat index there, and mask of its word."""

    @functools.cache
    def flat_indices(leaf: int) -> np.ndarray:
        path, shape = faults.paths[leaf], faults.shapes[leaf]
        elements = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        return np.argsort(to_torch_layout(path, elements, FLATTENED).ravel())

    return [
        (torch_name(faults.paths[leaf]), int(flat_indices(leaf)[element]), _word_mask(bit))
        for leaf, element, bit in zip(faults.leaf.tolist(), faults.element, faults.bit, strict=True)
    ]


def _word_mask(bit: int) -> int:
    """1 << bit as the int32 that PyTorch's words are."""
    return int(np.uint32(1 << int(bit)).view(np.int32))


def with_fault(model: torch.nn.Module, name: str, index: int, mask: int) -> torch.nn.Module:
    """A copy of the model with one bit of one parameter flipped."""
    faulty = copy.deepcopy(model)
    faulty.get_parameter(name).data.view(torch.int32).view(-1)[index] ^= mask
    return faulty


def judge(golden: np.ndarray, faulty: np.ndarray) -> np.ndarray:
    """[N] uint8 outcomes of float32 logits; a NaN counts as argmax takes it, as in `run_jaxfi`."""
    changed = (golden.view(np.uint32) != faulty.view(np.uint32)).any(axis=1)
    moved = golden.argmax(axis=1) != faulty.argmax(axis=1)
    return np.select([~changed, moved], [MASKED, CRITICAL], NON_CRITICAL).astype(np.uint8)


def run_reference(
    settings: Any, subject: Subject, faults: FaultList, num_images: int, compile: Callable
) -> float:
    """Seconds of plain re-execution in JAX, one fault at a time, compiled before."""
    network, injected = compile(subject.apply_fn), compile(inject)
    params = jax.device_put(subject.variables["params"])
    starts = range(0, num_images, min(settings.batch_size, num_images))
    batches = [jnp.asarray(subject.images[i : i + starts.step]) for i in starts]

    def rerun(params: PyTree) -> np.ndarray:
        return np.concatenate([np.asarray(network(params, batch)) for batch in batches])

    with jax.default_matmul_precision(settings.precision):
        golden = rerun(injected(params, faults.fault(0)))
        start = time.perf_counter()
        for row in range(len(faults)):
            faulty = rerun(injected(params, faults.fault(row)))
            judge(golden, faulty)
        return time.perf_counter() - start
