"""Each criterion against a few lines of NumPy, on random outputs, and on those at the edges."""

from __future__ import annotations

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxfi
from jaxfi import criteria

BATCH = 7


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def ranked(row: np.ndarray) -> list[int]:
    return sorted(range(len(row)), key=lambda c: (-row[c], c))


def in_numpy_top_k(golden: np.ndarray, faulty: np.ndarray, k: int) -> list[bool]:
    return [int(np.argmax(f)) not in ranked(g)[:k] for g, f in zip(golden, faulty, strict=True)]


def in_numpy_confidence(golden: np.ndarray, faulty: np.ndarray, x: float) -> list[bool]:
    first = golden.argmax(axis=1)
    before, after = (softmax(v)[np.arange(len(v)), first] for v in (golden, faulty))
    return (np.abs(after - before) > x * before).tolist()


def in_numpy_mean_iou(golden: np.ndarray, faulty: np.ndarray) -> np.ndarray:
    found = []
    for g, f in zip(golden.argmax(axis=-1), faulty.argmax(axis=-1), strict=True):
        present = sorted({*g.ravel().tolist(), *f.ravel().tolist()})
        shares = [((g == c) & (f == c)).sum() / ((g == c) | (f == c)).sum() for c in present]
        found.append(np.mean(shares))
    return np.array(found)


ORACLES: dict[str, tuple[criteria.Criterion, Callable, tuple[int, ...]]] = {
    "argmax": (criteria.argmax, lambda g, f: g.argmax(1) != f.argmax(1), (5,)),
    "top_2": (criteria.top_k(2), lambda g, f: in_numpy_top_k(g, f, 2), (5,)),
    "top_4": (criteria.top_k(4), lambda g, f: in_numpy_top_k(g, f, 4), (5,)),
    "confidence": (
        criteria.confidence_drop(0.1), lambda g, f: in_numpy_confidence(g, f, 0.1), (5,)
    ),
    "relative": (
        criteria.relative_error(0.2), lambda g, f: (abs(f - g) > 0.2 * abs(g)).any((1, 2)), (2, 3)
    ),
    "absolute": (criteria.absolute_error(0.5), lambda g, f: (abs(f - g) > 0.5).any(1), (4,)),
    "threshold": (criteria.threshold(0.3), lambda g, f: (g > 0.3) != (f > 0.3), ()),
    "thresholds": (
        criteria.threshold(0.3), lambda g, f: ((g > 0.3) != (f > 0.3)).any(1), (3,)
    ),
    "segmentation": (
        criteria.segmentation_iou(0.8), lambda g, f: in_numpy_mean_iou(g, f) < 0.8, (3, 4, 3)
    ),
    "next_token": (
        criteria.next_token, lambda g, f: g[:, -1].argmax(1) != f[:, -1].argmax(1), (4, 6)
    ),
    "sequence": (criteria.sequence, lambda g, f: (g.argmax(2) != f.argmax(2)).any(1), (4, 6)),
}  # fmt: skip


def outputs(seed: int, shape: tuple[int, ...], spread: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    golden = random.normal(size=(BATCH, *shape)).astype(np.float32)
    return golden, (golden + spread * random.normal(size=golden.shape)).astype(np.float32)


def asked(criterion: criteria.Criterion, golden: np.ndarray, faulty: np.ndarray) -> list[bool]:
    golden, faulty = jax.tree.map(jnp.asarray, (golden, faulty))
    return jax.jit(criterion)(golden, faulty, None).tolist()


@pytest.mark.parametrize("name", ORACLES)
def test_as_in_numpy(name: str) -> None:
    criterion, oracle, shape = ORACLES[name]
    both = set()
    for seed in range(30):
        golden, faulty = outputs(seed, shape, spread=[0.02, 0.3, 2.0][seed % 3])
        expected = np.asarray(oracle(golden, faulty)).tolist()
        assert asked(criterion, golden, faulty) == expected
        both |= set(expected)
    assert both == {True, False}


@pytest.mark.parametrize("name", ORACLES)
def test_what_is_golden_meets_none(name: str) -> None:
    criterion, _, shape = ORACLES[name]
    golden, _ = outputs(0, shape, 0.0)
    golden.reshape(BATCH, -1)[1, 0] = np.nan
    golden.reshape(BATCH, -1)[2, 0] = np.inf
    golden.reshape(BATCH, -1)[3, :] = 0.0
    assert asked(criterion, golden, golden.copy()) == [False] * BATCH


@pytest.mark.parametrize("name", ORACLES)
def test_nan_meets_all(name: str) -> None:
    criterion, _, shape = ORACLES[name]
    golden, _ = outputs(0, shape, 0.0)
    faulty = golden.copy()
    faulty[4] = np.nan
    assert asked(criterion, golden, faulty) == [row == 4 for row in range(BATCH)]


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (3, 4), elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, np.inf])),
    hnp.arrays(np.float32, (3, 4), elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, np.inf])),
    st.integers(1, 3),
)
def test_equal_values_rank_by_class(golden: np.ndarray, faulty: np.ndarray, k: int) -> None:
    found = criteria.top_k(k)(jnp.asarray(golden), jnp.asarray(faulty), None).tolist()
    differ = (golden != faulty).any(axis=1)
    assert found == (np.array(in_numpy_top_k(golden, faulty, k)) & differ).tolist()


def test_a_value_of_zero_or_infinity_moves_by_anything() -> None:
    golden = jnp.array([[0.0], [0.0], [jnp.inf], [1.0]])
    faulty = jnp.array([[-0.0], [1e-30], [1.0], [jnp.inf]])
    assert criteria.relative_error(0.5)(golden, faulty, None).tolist() == [False, True, True, True]


def test_integers_have_errors() -> None:
    golden, faulty = jnp.array([[3, 0]], jnp.uint8), jnp.array([[250, 0]], jnp.uint8)
    assert criteria.absolute_error(200)(golden, faulty, None).tolist() == [True]
    assert criteria.absolute_error(250)(golden, faulty, None).tolist() == [False]


def in_numpy_set_changed(golden: tuple, faulty: tuple, x: float, score: float) -> bool:
    """Greedy matching, as COCO's evaluation has it."""

    def iou(a, b):
        width, height = (min(a[n + 2], b[n + 2]) - max(a[n], b[n]) for n in (0, 1))
        both = max(width, 0) * max(height, 0)
        areas = [max(c[2] - c[0], 0) * max(c[3] - c[1], 0) for c in (a, b)]
        return both / (sum(areas) - both) if sum(areas) > both else 0.0

    (boxes, scores, labels), (others, other_scores, other_labels) = golden, faulty
    free = [n for n in range(len(others)) if other_scores[n] >= score]
    for n in sorted(range(len(boxes)), key=lambda n: -scores[n]):
        if scores[n] < score:
            continue
        fits = [m for m in free if other_labels[m] == labels[n] and iou(boxes[n], others[m]) >= x]
        if not fits:
            return True
        free.remove(max(fits, key=lambda m: iou(boxes[n], others[m])))
    return bool(free)


def detections(seed: int, move: float) -> tuple[dict, dict]:
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 6, (BATCH, 4, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 4, (BATCH, 4, 2))], axis=2)
    scores, labels = random.uniform(0.3, 1, (BATCH, 4)), random.integers(0, 2, (BATCH, 4))
    golden = {"boxes": boxes, "scores": scores, "labels": labels}
    order = np.argsort(random.random((BATCH, 4)), axis=1)  # the same ones, in another order
    faulty = {
        name: np.take_along_axis(array, order[:, :, None] if array.ndim == 3 else order, axis=1)
        for name, array in golden.items()
    }
    faulty["boxes"] = faulty["boxes"] + move * random.normal(size=boxes.shape)
    faulty["scores"] = faulty["scores"] + move / 5 * random.normal(size=scores.shape)
    return tuple(
        {name: np.asarray(a, np.int32 if name == "labels" else np.float32) for name, a in d.items()}
        for d in (golden, faulty)
    )  # type: ignore[return-value]


def test_detections_as_in_numpy() -> None:
    criterion, both = jax.jit(criteria.boxes_iou(0.6)), set()
    for seed in range(24):
        golden, faulty = detections(seed, move=[0.0, 0.1, 0.5][seed % 3])
        found = criterion(golden, faulty, None).tolist()
        in_tuples = criterion(tuple(golden.values()), tuple(faulty.values()), None).tolist()
        rows = [[tuple(d[k][n] for k in d) for d in (golden, faulty)] for n in range(BATCH)]
        expected = [in_numpy_set_changed(*row, 0.6, 0.5) for row in rows]
        assert found == in_tuples == expected
        both |= set(expected)
        if seed % 3 == 0:
            assert not any(found)  # the order says nothing
    assert both == {True, False}


def test_detections_without_labels_and_with_nan() -> None:
    golden, faulty = detections(1, 0.0)
    for outputs in (golden, faulty):
        del outputs["labels"]
    for outputs in (golden, faulty):
        outputs["scores"][3, :2] = 0.9, 0.1
    faulty["boxes"][3, 0, 0] = np.nan
    faulty["boxes"][4, faulty["scores"][4] < 0.5, 0] = np.nan  # of none that is detected
    assert asked(criteria.boxes_iou(0.5), golden, faulty) == [row == 3 for row in range(BATCH)]


def test_detections_of_no_area_and_of_16_bits() -> None:
    boxes = np.array([[[5.0, 5, 1, 1], [0, 0, 1, 1]]], np.float32)
    golden = {"boxes": boxes, "scores": np.array([[0.9, 0.2]], np.float32)}
    moved = {**golden, "boxes": boxes + np.array([[[0.0], [0.25]]], np.float32)}
    assert asked(criteria.boxes_iou(0.5), golden, moved) == [False]
    large = np.array([[[0.0, 0, 640, 480]]], np.float16)
    one = {"boxes": large, "scores": np.ones((1, 1), np.float32)}
    other = {**one, "boxes": large + np.float16(1)}
    assert asked(criteria.boxes_iou(0.5), one, other) == [False]


def test_detections_by_name_in_any_order() -> None:
    Found = collections.namedtuple("Found", "boxes labels scores")
    golden, faulty = detections(1, 0.0)
    faulty["scores"] = golden["scores"] + np.float32(1e-4)
    faulty["boxes"], faulty["labels"] = golden["boxes"], golden["labels"]
    there, here = ({**d} for d in (golden, faulty))
    named = asked(criteria.boxes_iou(0.5), Found(**there), Found(**here))
    assert named == asked(criteria.boxes_iou(0.5), golden, faulty)


@pytest.mark.parametrize("wide", [2**24, 2**30])
def test_large_integers_move_by_one(wide: int) -> None:
    golden, faulty = (
        jnp.array([[wide], [-wide]], jnp.int32),
        jnp.array([[wide + 1], [wide]], jnp.int32),
    )
    for criterion in (criteria.absolute_error(0.5), criteria.relative_error(0)):
        assert criterion(golden, faulty, None).tolist() == [True, True]
    assert criteria.threshold(wide)(golden, faulty, None).tolist() == [True, False]
    assert criteria.threshold(2.0**40)(golden, faulty, None).tolist() == [False, False]


def test_argmax_of_golden_nan() -> None:
    golden, faulty = np.array([[1, np.nan, 3]], np.float32), np.array([[1, 2, 5]], np.float32)
    assert asked(criteria.argmax, golden, faulty) == [True]
    outcome, _ = jaxfi.classify(golden, faulty)
    assert outcome.tolist() == [2]


def test_nested_outputs_have_paths() -> None:
    golden = {"a": {"b": jnp.array([[0.0, 1.0]])}, "c": jnp.zeros((1, 2))}
    faulty = {"a": {"b": jnp.array([[2.0, 1.0]])}, "c": jnp.zeros((1, 2))}
    assert criteria.on("a/b", criteria.argmax)(golden, faulty, None).tolist() == [True]


@pytest.mark.parametrize(
    "criterion",
    [criteria.relative_error(1), criteria.absolute_error(1), criteria.threshold(1),
     criteria.segmentation_iou(0.5), criteria.confidence_drop(1), criteria.sequence],
)  # fmt: skip
def test_several_outputs_are_named(criterion: criteria.Criterion) -> None:
    several = {"a": jnp.zeros((1, 2)), "b": jnp.zeros((1, 2))}
    with pytest.raises(ValueError, match=r"was given several outputs: name one, .*criteria.on"):
        criterion(several, several, None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: criteria.top_k(0), "k is 0: allowed are integers from 1"),
        (lambda: criteria.top_k(True), "k is True"),
        (lambda: criteria.confidence_drop(-0.1), "x is -0.1: allowed are fractions from 0"),
        (lambda: criteria.segmentation_iou(0), "x is 0: allowed are fractions above 0, up to 1"),
        (lambda: criteria.boxes_iou(1.5), "x is 1.5"),
        (lambda: criteria.threshold(float("nan")), "x is nan: allowed are numbers"),
        (lambda: criteria.top_k(4)(jnp.zeros((2, 4)), jnp.zeros((2, 4)), None), "is never met"),
        (lambda: criteria.argmax({"a": 1, "b": 2}, {"a": 1, "b": 2}), "several outputs: name one"),
        (lambda: criteria.next_token(jnp.zeros((2, 4)), jnp.zeros((2, 4))), r"\[2, 4\]"),
        (lambda: criteria.segmentation_iou(0.5)(jnp.zeros((2, 4)), jnp.zeros((2, 4)), None),
         r"\[batch, height, width, classes\]"),
        (lambda: criteria.on("b", criteria.argmax)({"a": 1}, {"a": 1}, None), "no 'b'"),
        (lambda: criteria.boxes_iou(0.5)({"boxes": 1}, {}, None), "no 'scores'"),
        (lambda: criteria.boxes_iou(0.5)(2 * (jnp.zeros((2, 4)),), (), None), "boxes .batch, n, 4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
