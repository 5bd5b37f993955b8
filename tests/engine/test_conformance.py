"""The fast engine against plain re-execution, outcome for outcome, on models of many kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfi import FAULT_MODELS, FaultList, run_campaign
from jaxfi.faults import word_bits
from tests import conformance_models

NUM_IMAGES, BATCH_SIZE = 13, 5  # the last batch is ragged


def fields(dtype: str) -> list[range]:
    """Bits of the low mantissa, high mantissa, exponent and sign; of an integer, its quarters."""
    width = word_bits(dtype)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        return [range(n * width // 4, (n + 1) * width // 4) for n in range(4)]
    mantissa = jnp.finfo(dtype).nmant
    half = mantissa // 2
    return [range(half), range(half, mantissa), range(mantissa, width - 1), range(width - 1, width)]


def faults_in_every_leaf(params, seed: int = 0) -> FaultList:
    """Three bit-flips in different fields of each leaf, and one fault of another model."""
    generator = np.random.default_rng(seed)
    rows = []
    for number, leaf in enumerate(jax.tree.leaves(params)):
        elements = generator.integers(0, leaf.size, 4)
        for turn in range(3):
            bit = generator.choice(fields(str(leaf.dtype))[(number + turn) % 4])
            rows.append((number, elements[turn], bit, FAULT_MODELS.index("bit-flip"), np.nan))
        model = ("zero", "value", "stuck-at-0", "stuck-at-1")[number % 4]
        bit = generator.integers(0, word_bits(str(leaf.dtype))) if "stuck" in model else -1
        value = 3.0 if model == "value" else np.nan
        rows.append((number, elements[3], bit, FAULT_MODELS.index(model), value))
    order = generator.permutation(len(rows))
    return FaultList.from_arrays(params, *zip(*(rows[n] for n in order), strict=True))


def assert_fast_is_reference(
    apply_fn, params, shape, faults=None, batch_size: int = BATCH_SIZE
) -> None:
    faults = faults_in_every_leaf(params) if faults is None else faults
    generator = np.random.default_rng(1)
    images = generator.normal(size=(NUM_IMAGES, *shape)).astype(np.float32)
    labels = generator.integers(0, 4, NUM_IMAGES)
    fast, reference = (
        run_campaign(apply_fn, params, faults, images, labels, engine=e, batch_size=batch_size)
        for e in ("fast", "reference")
    )
    differing = np.any(fast.outcomes != reference.outcomes, axis=1)
    leaves = sorted({faults.paths[leaf] for leaf in faults.leaf[differing]})
    assert not leaves, f"{differing.sum()} of {len(faults)} faults differ, in {leaves}"
    np.testing.assert_array_equal(fast.due, reference.due)
    np.testing.assert_array_equal(fast.correct, reference.correct)
    assert len(np.unique(reference.outcomes)) > 1  # otherwise the comparison shows little


_SLOW = {"vision_transformer", "residual", "residual_projected", "wide_convolutions"}
_TINY = [
    pytest.param(model, id=model.__name__, marks=[pytest.mark.slow] * (model.__name__ in _SLOW))
    for model in conformance_models.TINY
]


@pytest.mark.filterwarnings("ignore:the output does not depend on")
@pytest.mark.parametrize("model", _TINY)
def test_fast_equals_reference(model) -> None:
    with jax.numpy_rank_promotion("allow"):  # other libraries' layers promote
        mixes = model is conformance_models.batch_coupled  # no batch of it may be filled up
        assert_fast_is_reference(*model(), batch_size=NUM_IMAGES if mixes else BATCH_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet", "resnet9", "resnet18", "resnet20", "vgg11", "vgg16"])
def test_fast_equals_reference_at_full_size(name: str) -> None:
    assert_fast_is_reference(*conformance_models.studied(name))
