"""What a campaign asks of each faulty output: its outcome, and the user's own criteria."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.engine._plan import mixes_images
from jaxfi.faults._transforms import PyTree, to_words
from jaxfi.network._frozen import Frozen
from jaxfi.network._graph import digest_of, is_known_by_digest, trace_network
from jaxfi.network._layout import Layout, layout_of
from jaxfi.network._rows import Certain
from jaxfi.outcomes._outcomes import CRITICAL, MASKED, NON_CRITICAL, Rates, Verdict, judge

Criterion = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""`fn(golden, faulty, targets) -> [batch] bool`: whether the faulty outputs meet it. Pure, and each
image by itself."""

_MOST = 28  # criteria: a pair's answers are one word of 32 bits
_NAME = re.compile(r"[A-Za-z_]\w*")
_COLUMNS = (  # of tables
    "layer", "faults", "name", "num_faults", "row", "path", "index", "element", "bit", "model",
    "value_before", "value_after", "correct", "outcomes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """What is asked. Equal where the same is asked: programs are compiled once.

    Attributes:
      nan: see `jaxfi.outcomes.judge`.
      layout: of the outputs in the array [batch, width] that the engine sees; None where they are
        one array [batch, classes].
      critical: says which changed outputs are critical; None: those whose argmax is another.
      criteria: by name.
      critical_name: of the criterion that says what is critical; None for the argmax.
      container: what the one array [batch, classes] is in, a tree of one leaf.
      digests: of what each computes, `critical` among them; a campaign's directory names them.
    """

    nan: str
    layout: Layout | None = None
    critical: Criterion | None = None
    criteria: Mapping[str, Criterion] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    critical_name: str | None = None
    container: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Questions) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple:
        return self.nan, self.layout, self.critical_name, tuple(self.digests.items())

    @property
    def word(self) -> np.dtype:
        """Of a pair's answers: outcome in two bits, DUE, correct, then the criteria."""
        bits = 4 + len(self.criteria)
        return np.dtype(f"uint{8 if bits <= 8 else 16 if bits <= 16 else 32}")

    def outputs(self, array: Any) -> Any:
        """The outputs as the user's function arranges them, of what the engine sees."""
        if self.layout is not None:
            return self.layout.unpack(array)
        return array if self.container is None else jax.tree.unflatten(self.container, [array])

    def nothing(self, array: np.ndarray) -> np.ndarray:
        """[1, width] of outputs that are not known: NaN where they are floats."""
        if self.layout is None:
            return np.full_like(array[:1], np.nan)
        leaves = [
            np.full((1, *shape), np.nan if jnp.issubdtype(dtype, jnp.floating) else 0, dtype)
            for shape, dtype in zip(
                self.layout.shapes, map(jnp.dtype, self.layout.dtypes), strict=True
            )
        ]
        return np.asarray(self.layout.pack(leaves))

    def holds_nan(self, array: np.ndarray) -> np.ndarray:
        """[n] bool: rows of outputs that hold NaN."""
        return np.any([np.isnan(part).any(axis=1) for part in self._floats(array)], axis=0)

    def is_finite(self, array: np.ndarray) -> np.ndarray:
        """[n] bool: rows of outputs without NaN and Inf."""
        return np.all([np.isfinite(part).all(axis=1) for part in self._floats(array)], axis=0)

    def answers(self, golden: Any, faulty: Any, labels: Any, targets: PyTree) -> jax.Array:
        """[batch] words; traced inside programs. Labels are -1 where no class is right."""
        verdict = self._verdict(golden, faulty, labels, targets)
        word = verdict.outcome.astype(self.word)
        flags = [verdict.due, verdict.correct]
        if self.criteria:
            before, after = self.outputs(golden), self.outputs(faulty)
            flags += [fn(before, after, targets) for fn in self.criteria.values()]
        for number, flag in enumerate(flags):
            word |= flag.astype(self.word) << (2 + number)
        return word

    def _verdict(self, golden: Any, faulty: Any, labels: Any, targets: PyTree) -> Verdict:
        if self.layout is None and self.critical is None:
            return judge(golden, faulty, labels, self.nan)
        same_bits = jnp.all(to_words(golden) == to_words(faulty), axis=1)
        wrong = correct = jnp.zeros(same_bits.shape, bool)
        if self.layout is None:
            correct = judge(golden, faulty, labels, self.nan).correct
        parts = self._floats(faulty)
        if self.critical is not None:
            wrong = self.critical(self.outputs(golden), self.outputs(faulty), targets)
        if self.nan == "critical":
            wrong |= sum((jnp.isnan(part).any(axis=1) for part in parts), start=wrong)
        finite = [jnp.isfinite(part).all(axis=1) for part in parts]
        due = ~jnp.all(jnp.stack([jnp.ones_like(wrong), *finite]), axis=0)
        changed = jnp.where(wrong, CRITICAL, NON_CRITICAL)
        return Verdict(jnp.where(same_bits, MASKED, changed).astype(jnp.uint8), due, correct)

    def _floats(self, array: Any) -> list:
        """The outputs that are floats, [n, k] each."""
        parts = [array] if self.layout is None else self.layout.leaves(array)
        floats = [part for part in parts if jnp.issubdtype(part.dtype, jnp.floating)]
        return [part.reshape(part.shape[0], -1) for part in floats]


def questions_of(
    criteria: Mapping[str, Criterion] | None, nan: str, outputs: Any, batch: int, targets: PyTree
) -> Questions:
    """What a campaign asks of outputs.

    Args:
      criteria: the user's own, by name; "critical" takes the place of the argmax.
      nan: see `jaxfi.outcomes.judge`.
      outputs: shapes of what the network returns for a batch, [batch, ...] each.
      targets: a tree of arrays [N, ...], or None.

    Raises ValueError or TypeError naming a criterion that does not fit, or outputs of which nothing
    says what is critical.
    """
    if not criteria:
        return Questions(nan)
    _check_names(criteria)
    leaves = jax.tree.leaves(outputs)
    floating = len(leaves) == 1 and jnp.issubdtype(leaves[0].dtype, jnp.floating)
    classes = floating and leaves[0].ndim == 2 and leaves[0].shape[1] > 1
    layout = None if classes else layout_of("the outputs", outputs, batch)
    of_batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype), targets
    )
    asked, digests = {}, {}
    for name, function in criteria.items():
        asked[name], digests[name] = _frozen_criterion(name, function, outputs, batch, of_batch)
    decides = "critical" if "critical" in asked else None if classes else next(iter(asked))
    critical = None if decides is None else asked[decides]
    asked.pop("critical", None)
    container = jax.tree.structure(outputs) if classes else None
    return Questions(nan, layout, critical, asked, digests, decides, container)


def _check_names(criteria: Mapping[str, Criterion]) -> None:
    if not isinstance(criteria, Mapping):
        raise TypeError(
            f"criteria are a {type(criteria).__name__}: allowed is a dict of functions by name"
        )
    taken = {*Rates._fields, *_COLUMNS} - {"critical"}
    for name, function in criteria.items():
        fits = isinstance(name, str) and _NAME.fullmatch(name) and name not in taken
        if not fits or str(name).endswith(("_low", "_high")):
            raise ValueError(
                f"a criterion is called {name!r}: allowed are names like sdc5, but for "
                f"{', '.join(sorted(taken))}, and those that end in _low or _high"
            )
        if not callable(function):
            raise TypeError(
                f"criterion {name!r} is a {type(function).__name__}: allowed is a function of "
                "golden outputs, faulty ones and targets"
            )
    if len(criteria) > _MOST:
        raise ValueError(f"there are {len(criteria)} criteria: allowed are up to {_MOST}")


def _frozen_criterion(
    name: str, function: Criterion, outputs: Any, batch: int, targets: Any
) -> tuple[Criterion, str]:
    """The criterion as it is now, and the digest of what it computes."""

    def asked(both: Any, targets: Any) -> Any:
        golden, faulty = both
        return function(golden, faulty, targets)

    both = outputs, outputs
    frozen, again = Frozen(asked), Frozen(asked)
    try:
        found = jax.tree.leaves(frozen.outputs(both, targets))
        found_again = again.traced(both, targets)
    except Exception as error:  # the user's function may raise anything
        told = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(outputs))
        raise ValueError(
            f"criterion {name!r} cannot be asked of outputs {told}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if [(leaf.shape, leaf.dtype) for leaf in found] != [((batch,), np.dtype(bool))]:
        told = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in found) or "nothing"
        raise ValueError(
            f"criterion {name!r} returned {told} for {batch} images: allowed is bool[{batch}], one "
            "answer an image"
        )
    digest = digest_of(frozen.traced(both, targets))
    if digest != digest_of(found_again):
        raise ValueError(
            f"criterion {name!r} computes something else each time that it is called: allowed are "
            "pure functions of golden outputs, faulty ones and targets"
        )

    def ask(golden: Any, faulty: Any, targets: Any) -> jax.Array:
        return frozen((golden, faulty), targets)

    return _each_by_itself(name, ask, (*both, targets), batch), digest


def _each_by_itself(name: str, ask: Criterion, shapes: tuple, batch: int) -> Criterion:
    """The criterion, if its structure shows that it asks each image by itself; where that cannot be
    seen it is asked image by image. ValueError where it does not, and for callbacks into Python,
    of which nothing is seen."""
    layout = layout_of(f"what criterion {name!r} is asked of", shapes, batch)

    def of_array(_: dict, packed: jax.Array) -> jax.Array:
        return ask(*layout.unpack(packed))[:, None]

    network = trace_network(of_array, {}, jax.ShapeDtypeStruct((batch, layout.width), layout.dtype))
    if not is_known_by_digest(network):
        raise ValueError(
            f"criterion {name!r} calls back into Python, which cannot be told from another call: "
            "allowed are JAX's own operations"
        )
    reason = mixes_images(network, [network.image], [])
    if not reason:
        return ask

    def by_image(golden: Any, faulty: Any, targets: Any) -> jax.Array:
        def one(*values: Any) -> jax.Array:
            return ask(*jax.tree.map(lambda value: value[None], values))[0]

        return jax.vmap(one)(golden, faulty, targets)

    wrong = f"criterion {name!r} answers for an image by others of its batch ({reason})"
    try:
        jax.eval_shape(by_image, *shapes)
    except Exception as error:  # the user's function may raise anything
        raise ValueError(
            f"{wrong}, or for one number of images: allowed are criteria of each image by itself, "
            "of any number"
        ) from error
    if isinstance(reason, Certain) or not _agree(ask, by_image, shapes):
        raise ValueError(f"{wrong}: allowed are criteria of each image by itself")
    return by_image


def _agree(ask: Criterion, by_image: Criterion, shapes: tuple) -> bool:
    """Whether both answer alike for some random values."""
    random = np.random.default_rng(0)

    def values(like: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(like.dtype, jnp.inexact):
            return jnp.asarray(random.normal(size=like.shape), like.dtype)
        return jnp.asarray(
            random.integers(0, 2 if like.dtype == bool else 9, like.shape), like.dtype
        )

    for spread in (1.0, 1e-3):
        golden, other, targets = jax.tree.map(values, shapes)
        faulty = jax.tree.map(
            lambda a, b, spread=spread: (
                a + jnp.asarray(spread, a.dtype) * b if jnp.issubdtype(a.dtype, jnp.inexact) else b
            ),
            golden,
            other,
        )
        here, there = (jax.jit(f)(golden, faulty, targets) for f in (ask, by_image))
        if not np.array_equal(here, there):
            return False
    return True


def answers_of(word: np.ndarray, num_criteria: int) -> list[np.ndarray]:
    """Outcome uint8, and bool each: DUE, correct, criteria; of words from `Questions.answers`."""
    flags = [(word >> (2 + number)) & 1 > 0 for number in range(2 + num_criteria)]
    return [(word & 3).astype(np.uint8), *flags]
