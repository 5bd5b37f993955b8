"""Questions to ask of a faulty output beside its outcome: `run_campaign(..., criteria={...})`.

A criterion is a pure function `fn(golden, faulty, targets) -> [batch] bool`: whether the faulty
outputs of a network meet it, each image by itself. Outputs are as the network returns them
(of a dataclass that JAX does not know, a dict); targets are what `run_campaign` was given as
labels. Of outputs that are one array in a container, those here take that.

Those here are met by a changed output that holds NaN where they look (`boxes_iou` looks at what is
detected), and never by an output that is golden's to the bit. `on` asks one of a network's several
outputs.

Sources: SDC-1, SDC-5, SDC-10 %, SDC-20 %: Li, Hari, Sullivan et al., *Understanding error
propagation in deep learning neural network (DNN) accelerators and applications*, SC 2017. Relative
error: Oliveira, Pilla, Hanzich et al., *Radiation-induced error criticality in modern HPC parallel
accelerators*, HPCA 2017. Intersection over union:
Everingham et al., *The PASCAL visual object classes challenge*, Int. J. Comput. Vis. 2015; an image
whose detections changed: Qutub et al., *Hardware faults that matter: understanding and estimating
the safety impact of hardware faults on object detection DNNs* (IVMOD), SafeComp 2022.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Criterion = Callable[[Any, Any, Any], jax.Array]

__all__ = [
    "absolute_error",
    "argmax",
    "boxes_iou",
    "confidence_drop",
    "next_token",
    "on",
    "relative_error",
    "segmentation_iou",
    "sequence",
    "threshold",
    "top_k",
]


def on(name: str | int, criterion: Criterion) -> Criterion:
    """The criterion asked of one of several outputs: `on("logits", top_k(5))`.

    Args:
      name: a key of a dict, a field's name, or a position in a tuple; of what is nested, "a/b".
      criterion: of that output.

    >>> golden = {"logits": jnp.array([[0.0, 1.0]]), "features": jnp.zeros((1, 9))}
    >>> faulty = {"logits": jnp.array([[2.0, 1.0]]), "features": jnp.zeros((1, 9))}
    >>> on("logits", argmax)(golden, faulty, None).tolist()
    [True]
    """

    def asked(golden: Any, faulty: Any, targets: Any) -> jax.Array:
        return criterion(_of(golden, name), _of(faulty, name), targets)

    return asked


def argmax(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
    """The largest of the outputs [batch, classes] is another class: SDC-1."""
    return top_k(1)(golden, faulty, targets)


def top_k(k: int) -> Criterion:
    """The faulty network's first class is not among the golden one's first k: SDC-k (SDC-5).

    Of outputs [batch, classes], logits or probabilities. Equal values rank by their class, the
    first one first.

    >>> golden, faulty = jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[3.0, 9.0, 1.0]])
    >>> top_k(1)(golden, faulty, None).tolist(), top_k(2)(golden, faulty, None).tolist()
    ([True], [False])
    """
    _check("k", k, isinstance(k, int) and k >= 1, "integers from 1")

    def asked(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
        golden, faulty = _alone("top_k", "[batch, classes]", (2,), golden, faulty)
        if k >= golden.shape[1]:
            raise ValueError(
                f"top_k({k}) of {golden.shape[1]} classes is never met: allowed is k below that"
            )
        first = jnp.argmax(faulty, axis=1)  # NaN is the largest, in golden too
        value = jnp.take_along_axis(golden, first[:, None], axis=1)
        before = jnp.arange(golden.shape[1])[None] < first[:, None]
        larger = (golden > value) | (_is_nan(golden) & ~_is_nan(value))
        ahead = jnp.sum(larger | (~_differs(golden, value) & before), axis=1)
        return _changed_to_nan(golden, faulty) | ((ahead >= k) & _changed(golden, faulty))

    return asked


def confidence_drop(x: float, *, logits: bool = True) -> Criterion:
    """The probability of the golden network's first class moves by more than `x` of itself, up or
    down: SDC-10 % is `confidence_drop(0.1)`, SDC-20 % `confidence_drop(0.2)`.

    Args:
      x: a fraction.
      logits: the outputs [batch, classes] are logits, of which the softmax are the probabilities.
    """
    _check("x", x, x >= 0, "fractions from 0")

    def asked(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
        golden, faulty = _alone("confidence_drop", "[batch, classes]", (2,), golden, faulty)
        before, after = (jax.nn.softmax(v) if logits else v for v in (golden, faulty))
        first = jnp.argmax(golden, axis=1)[:, None]
        before, after = (jnp.take_along_axis(v, first, axis=1)[:, 0] for v in (before, after))
        moved = ~(jnp.abs(after - before) <= x * jnp.abs(before))  # NaN too
        return moved & _changed(golden, faulty)

    return asked


def relative_error(x: float) -> Criterion:
    """Any output moves by more than `x` of its golden value; one that is 0 by anything at all.

    Of outputs [batch, ...], such as the estimates of a regression. `x` is a fraction.

    >>> relative_error(0.1)(jnp.array([[10.0], [10.0]]), jnp.array([[10.5], [12.0]]), None).tolist()
    [False, True]
    """
    _check("x", x, x >= 0, "fractions from 0")
    return _any_moves("relative_error", lambda golden: x * jnp.abs(golden))


def absolute_error(x: float) -> Criterion:
    """Any output [batch, ...] moves by more than `x`, in its own unit."""
    _check("x", x, x >= 0, "numbers from 0")
    return _any_moves("absolute_error", lambda golden: x)


def threshold(x: float) -> Criterion:
    """A decision `output > x` is another: of one output [batch] or [batch, 1], or of any of several
    [batch, n], such as labels of which an image can have several."""
    _check("x", x, not math.isnan(x), "numbers")

    def asked(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
        golden, faulty = _alone("threshold", "[batch] or [batch, n]", (1, 2), golden, faulty)
        limit: Any = x
        if jnp.issubdtype(golden.dtype, jnp.integer):  # as integers: floats are too coarse
            ends = jnp.iinfo(golden.dtype)
            if not ends.min <= x < ends.max:
                return jnp.zeros(len(golden), bool)
            limit = jnp.asarray(math.floor(x), golden.dtype)
        return _changed_to_nan(golden, faulty) | _any((golden > limit) != (faulty > limit))

    return asked


def segmentation_iou(x: float) -> Criterion:
    """The class map differs: the mean over classes of the intersection over union of golden and
    faulty pixels is below `x`.

    Of outputs [batch, ..., classes]; each pixel is of its largest class. The mean is over classes
    that either map has.
    """
    _check("x", x, 0 < x <= 1, "fractions above 0, up to 1")

    def asked(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
        allowed = "[batch, height, width, classes]"
        golden, faulty = _alone("segmentation_iou", allowed, (3, 4, 5), golden, faulty)
        num_classes = golden.shape[-1]
        before, after = (_by_image(jnp.argmax(v, axis=-1)) for v in (golden, faulty))

        def of_class(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            here, there = before == number, after == number
            return jnp.sum(here & there, axis=1), jnp.sum(here | there, axis=1)

        both, either = lax.map(of_class, jnp.arange(num_classes))  # [classes, batch] each
        share = jnp.where(either > 0, both / jnp.maximum(either, 1), 0.0)
        mean = share.sum(axis=0) / jnp.sum(either > 0, axis=0)
        return _changed_to_nan(golden, faulty) | ((mean < x) & _changed(golden, faulty))

    return asked


def boxes_iou(x: float, *, score: float = 0.5) -> Criterion:
    """The set of detections changed (IVMOD): one of the golden network has no partner in the faulty
    one's, or the other way round.

    Of outputs {"boxes": [batch, n, 4], "scores": [batch, n], "labels": [batch, n]}, or a tuple in
    that order; labels may be missing. Boxes are corners (x1, y1, x2, y2). Partners have the same
    label and an intersection over union of `x` or more; golden boxes choose in the order of their
    scores, each the best that is free.

    Args:
      x: least intersection over union of partners, a fraction.
      score: of a detection; what is below is none.
    """
    _check("x", x, 0 < x <= 1, "fractions above 0, up to 1")

    def asked(golden: Any, faulty: Any, targets: Any = None) -> jax.Array:
        before, after = _detections(golden), _detections(faulty)
        moved = jax.vmap(functools.partial(_set_changed, x, score))(before, after)
        changed = [_changed(a, b) for a, b in zip(before, after, strict=True)]
        return moved & functools.reduce(jnp.logical_or, changed)

    return asked


def next_token(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
    """The next token is another, by the largest logit: of outputs [batch, positions, vocabulary]
    that of the last position."""
    golden, faulty = _alone("next_token", "[batch, positions, vocabulary]", (3,), golden, faulty)
    return argmax(golden[:, -1], faulty[:, -1])


def sequence(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
    """The token of any position is another, by the largest logit: of outputs [batch, positions,
    vocabulary]."""
    golden, faulty = _alone("sequence", "[batch, positions, vocabulary]", (3,), golden, faulty)
    differs = jnp.argmax(golden, axis=-1) != jnp.argmax(faulty, axis=-1)
    return _changed_to_nan(golden, faulty) | _any(differs)


def _any_moves(name: str, allowed: Callable[[jax.Array], Any]) -> Criterion:
    def asked(golden: jax.Array, faulty: jax.Array, targets: Any = None) -> jax.Array:
        golden, faulty = _alone(name, "[batch, ...]", None, golden, faulty)
        if jnp.issubdtype(golden.dtype, jnp.inexact):
            wide, moved = golden, jnp.abs(faulty - golden)
        else:  # as integers: floats are too coarse for their difference
            up = faulty > golden
            golden_, faulty_ = (v.astype(_unsigned(golden.dtype)) for v in (golden, faulty))
            moved = jnp.where(up, faulty_ - golden_, golden_ - faulty_).astype(float)
            wide = golden.astype(float)
        far = ~(moved <= allowed(wide)) | ~jnp.isfinite(moved)
        return _any(far & _differs(golden, faulty))

    return asked


def _unsigned(dtype: Any) -> Any:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _detections(outputs: Any) -> tuple[jax.Array, ...]:
    """Boxes, scores, labels."""
    names = ("boxes", "scores", "labels")
    if type(outputs) not in (tuple, list):  # by name, whatever their order
        has = (
            outputs.__contains__
            if isinstance(outputs, Mapping)
            else functools.partial(hasattr, outputs)
        )
        missing = [name for name in names[:2] if not has(name)]
        if missing:
            raise ValueError(
                f"the outputs have no {missing[0]!r}: allowed are boxes, scores and labels"
            )
        parts = [_of(outputs, name) for name in names if has(name)]
    else:
        parts = [*outputs]
    if len(parts) not in (2, 3) or parts[0].ndim != 3 or parts[0].shape[-1] != 4:
        told = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(
            f"the outputs are {told}: allowed are boxes [batch, n, 4], scores and labels [batch, n]"
        )
    return parts[0], parts[1], parts[2] if len(parts) == 3 else jnp.zeros_like(parts[1], int)


def _set_changed(x: float, score: float, golden: tuple, faulty: tuple) -> jax.Array:
    """Of one image."""
    (boxes, scores, labels), (other_boxes, other_scores, other_labels) = golden, faulty
    there, others = scores >= score, other_scores >= score
    overlap = _iou(boxes[:, None], other_boxes[None])
    same = ~_differs(boxes[:, None], other_boxes[None]).any(axis=-1)  # also of no area
    overlap = jnp.where(same, 1.0, overlap)
    overlap = jnp.where(labels[:, None] == other_labels[None], overlap, -1.0)

    def choose(taken: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        free = jnp.where(others & ~taken, overlap[row], -1.0)
        best = jnp.argmax(free)
        found = there[row] & (free[best] >= x)
        return taken.at[best].set(taken[best] | found), found

    order = jnp.argsort(-scores)
    taken, found = lax.scan(choose, jnp.zeros_like(others), order)
    return (found != there[order]).any() | (taken != others).any()


def _iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes [..., 4] by their corners; areas of 16 bits overflow."""
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    a, b = a.astype(wide), b.astype(wide)
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    both = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    areas = [jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0), axis=-1) for box in (a, b)]
    either = areas[0] + areas[1] - both
    return jnp.where(either > 0, both / jnp.where(either > 0, either, 1), 0.0)


def _of(outputs: Any, name: str | int) -> Any:
    if (
        isinstance(name, str)
        and "/" in name
        and not (isinstance(outputs, Mapping) and name in outputs)
    ):
        first, _, rest = name.partition("/")
        return _of(_of(outputs, first), rest)
    try:
        if isinstance(name, str) and not isinstance(outputs, Mapping):
            return getattr(outputs, name)
        return outputs[name]
    except (KeyError, IndexError, AttributeError, TypeError):
        known = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"the outputs have no {name!r}: they are {known}") from None


def _by_image(array: jax.Array) -> jax.Array:
    """[batch, values]."""
    return array.reshape(array.shape[0], math.prod(array.shape[1:]))


def _any(flags: jax.Array) -> jax.Array:
    return _by_image(flags).any(axis=1)


def _changed(golden: jax.Array, faulty: jax.Array) -> jax.Array:
    return _any(_differs(golden, faulty))


def _differs(golden: jax.Array, faulty: jax.Array) -> jax.Array:
    """Of each value; not of two NaN."""
    return (golden != faulty) & ~(_is_nan(golden) & _is_nan(faulty))


def _changed_to_nan(golden: jax.Array, faulty: jax.Array) -> jax.Array:
    return _any(_is_nan(faulty) & ~_is_nan(golden))


def _is_nan(array: jax.Array) -> jax.Array:
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    return jnp.isnan(array) if inexact else jnp.zeros(array.shape, bool)


def _check(name: str, value: Any, fits: bool, allowed: str) -> None:
    if isinstance(value, bool) or not fits:
        raise ValueError(f"{name} is {value!r}: allowed are {allowed}")


def _alone(
    name: str, allowed: str, ranks: tuple[int, ...] | None, golden: Any, faulty: Any
) -> tuple[jax.Array, jax.Array]:
    """The one array that outputs hold; ValueError for several, or one of another rank."""
    both = [jax.tree.leaves(outputs) for outputs in (golden, faulty)]
    (array, *more), (other, *_) = both
    if more:
        raise ValueError(
            f"{name} is of one array {allowed}, and was given several outputs: name one, "
            f'jaxfi.criteria.on("logits", {name})'
        )
    if ranks is not None and jnp.ndim(array) not in ranks:
        shape = list(jnp.shape(array))
        raise ValueError(f"{name} is of one array {allowed}, and was given an array {shape}")
    return array, other
