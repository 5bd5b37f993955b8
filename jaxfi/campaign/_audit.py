"""A campaign checked against the network evaluated operation by operation, without its programs.

All engines go through one compiler, and share what it does to a network: a contraction, a fusion,
an order of sums. The audit evaluates random (fault, image) pairs one operation at a time, loops
turn by turn, each operation compiled by itself, on the campaign's own batches, and compares the
outcomes. What it shares with the campaign is the trace, single operations, and wide layers summed
in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxfi.engine._compilation import own_settings
from jaxfi.engine._questions import Questions, answers_of
from jaxfi.faults import FaultList, PyTree, inject
from jaxfi.faults._sampling import generator_of
from jaxfi.network import Network
from jaxfi.network._equations import Body, Value, body_env, call_parameter, read
from jaxfi.network._graph import run
from jaxfi.network._sources import scan_counts
from jaxfi.outcomes import Estimate, estimate_rate

NAMES = ("masked", "non-critical", "critical")


class Audit(NamedTuple):
    """How a campaign's outcomes agree with an evaluation operation by operation.

    Attributes:
      pairs: [n, 2] fault and image of each pair.
      outcomes, due: [n] of the campaign.
      audited, audited_due: [n] of the evaluation.
      disagreement: share of pairs that differ in outcome, DUE or a criterion, with its interval
        (99 %).
      same_answers: [n] bool, all of the campaign's own criteria are answered alike.
    """

    pairs: np.ndarray
    outcomes: np.ndarray
    due: np.ndarray
    audited: np.ndarray
    audited_due: np.ndarray
    disagreement: Estimate
    same_answers: np.ndarray

    @property
    def agrees(self) -> np.ndarray:
        """[n] bool."""
        same = (self.outcomes == self.audited) & (self.due == self.audited_due)
        return same & self.same_answers

    def __repr__(self) -> str:
        agrees = self.agrees
        by_outcome = [
            f"{name} {agrees[here].sum()} of {here.sum()}"
            for name, here in [
                *((name, self.outcomes == code) for code, name in enumerate(NAMES)),
                ("DUE", self.due),
            ]
        ]
        share, low, high = (100 * bound for bound in self.disagreement)
        return (
            f"{agrees.sum()} of {len(agrees)} pairs agree with the evaluation operation by "
            f"operation ({', '.join(by_outcome)}); disagreement {share:.2f} "
            f"[{low:.2f}, {high:.2f}] %"
        )


class Subject(NamedTuple):
    """What a campaign ran: the traced network, its parameters, batches, the precision, and what it
    asked, of which targets."""

    network: Network
    params: PyTree
    batches: np.ndarray
    precision: str
    questions: Questions
    targets: PyTree


def audited(
    subject: Subject,
    faults: FaultList,
    outcomes: np.ndarray,
    due: np.ndarray,
    num_pairs: int,
    key: int,
    images: np.ndarray | None = None,
    criteria: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Audit:
    """Evaluates `num_pairs` random pairs, distinct, drawn by `key`; outcomes, due: [F, N], or
    [F, m] of these `images` [F, m]; and so `criteria`."""
    num_pairs = min(num_pairs, outcomes.size)
    generator = np.random.Generator(generator_of(key))
    pairs = np.stack(np.divmod(
        generator.choice(outcomes.size, num_pairs, replace=False), outcomes.shape[1]
    ), axis=1)  # fmt: skip
    there = outcomes[pairs[:, 0], pairs[:, 1]], due[pairs[:, 0], pairs[:, 1]]
    answered = [met[pairs[:, 0], pairs[:, 1]] for met in criteria.values()]
    same = np.ones(num_pairs, bool)
    if images is not None:
        pairs[:, 1] = images[pairs[:, 0], pairs[:, 1]]
    batch_size = subject.batches.shape[1]
    number = pairs[:, 1] // batch_size
    found, found_due = np.zeros(num_pairs, np.uint8), np.zeros(num_pairs, bool)
    outputs, injected = _one_by_one(subject), jax.jit(inject)
    ask, labels = jax.jit(subject.questions.answers), np.zeros(batch_size, np.int32)
    num_images = next((len(leaf) for leaf in jax.tree.leaves(subject.targets)), 1)
    with own_settings(), jax.default_matmul_precision(subject.precision):
        for batch in np.unique(number):
            golden = outputs(subject.params, batch)
            images = np.minimum(np.arange(batch_size) + batch * batch_size, num_images - 1)
            targets = jax.tree.map(lambda array, chosen=images: array[chosen], subject.targets)
            for row in np.unique(pairs[number == batch, 0]):
                faulty = outputs(injected(subject.params, faults.fault(row)), batch)
                words = ask(golden, faulty, labels, targets)
                answers = answers_of(np.asarray(words), len(subject.questions.criteria))
                here = (number == batch) & (pairs[:, 0] == row)
                place = pairs[here, 1] - batch * batch_size
                found[here], found_due[here] = answers[0][place], answers[1][place]
                for kept, answer in zip(answered, answers[3:], strict=True):
                    same[here] &= kept[here] == answer[place]
    differs = ((found != there[0]) | (found_due != there[1]) | ~same).astype(float)
    share = estimate_rate(differs, 1, outcomes.size)
    return Audit(pairs, *there, found, found_due, share, same)


def _one_by_one(subject: Subject) -> Callable[[PyTree, int], jax.Array]:
    """The network's outputs of parameters and a batch's number, by single operations."""
    network, operations = subject.network, _Operations(subject.network)

    def outputs(params: PyTree, number: int) -> jax.Array:
        env = {**network.given, network.image: jnp.asarray(subject.batches[number])}
        env.update(zip(network.leaves, jax.tree.leaves(params), strict=True))
        return operations.values(network.equations, env, [network.output])[0]

    return outputs


class _Operations:
    """Evaluates equations one at a time, loops turn by turn; each operation is a program of its
    own, compiled once."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.programs: dict[int, Callable] = {}

    def values(
        self, equations: Iterable[core.JaxprEqn], env: dict, wanted: Iterable[Value]
    ) -> list:
        for equation in equations:
            results = self._results(equation, [read(env, value) for value in equation.invars])
            env.update(zip(equation.outvars, results, strict=True))
        return [read(env, value) for value in wanted]

    def _results(self, equation: core.JaxprEqn, operands: list) -> list:
        name, params = equation.primitive.name, equation.params
        called = call_parameter(equation)
        if called is not None:
            return self._body(params[called], operands)
        if name == "cond":
            return self._body(params["branches"][int(operands[0])], operands[1:])
        if name == "while":
            return self._while(params, operands)
        if name == "scan" and params["length"]:
            return self._scan(equation, operands)
        program = self.programs.get(id(equation))
        if program is None:
            program = jax.jit(lambda *operands: run(self.network, equation, list(operands)))
            self.programs[id(equation)] = program
        return program(*operands)

    def _body(self, body: Body, inputs: list) -> list:
        inner = getattr(body, "jaxpr", body)
        return self.values(inner.eqns, body_env(body, inputs), inner.outvars)

    def _while(self, params: dict, operands: list) -> list:
        of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
        test, consts = operands[:of_test], operands[of_test : of_test + of_body]
        carry = operands[of_test + of_body :]
        while bool(self._body(params["cond_jaxpr"], [*test, *carry])[0]):
            carry = self._body(params["body_jaxpr"], [*consts, *carry])
        return carry

    def _scan(self, equation: core.JaxprEqn, operands: list) -> list:
        params, (first, num_carry) = equation.params, scan_counts(equation)
        consts, carry = operands[:first], operands[first : first + num_carry]
        stacked = []
        turns = range(params["length"])
        for turn in reversed(turns) if params["reverse"] else turns:
            slices = [array[turn] for array in operands[first + num_carry :]]
            results = self._body(params["jaxpr"], [*consts, *carry, *slices])
            carry = results[:num_carry]
            stacked.append(results[num_carry:])
        if params["reverse"]:
            stacked.reverse()
        return [*carry, *map(jnp.stack, zip(*stacked, strict=True))]
