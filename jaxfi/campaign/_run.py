"""A campaign: every fault on every image, counted, checked by null faults, saved and resumed."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxfi.campaign._audit import Subject
from jaxfi.campaign._checks import (
    check_choices,
    check_faults,
    check_images_per_fault,
    check_last_batch,
    checked_devices,
    checked_inputs,
    checked_loop_limit,
    checked_memory,
    warn_of_idle_faults,
    warn_of_non_finite,
)
from jaxfi.campaign._counts import CampaignCounts, Counts, counts_of, no_counts
from jaxfi.campaign._fingerprint import fingerprint
from jaxfi.campaign._ledger import Kept, Ledger, MemoryLedger, open_directory
from jaxfi.campaign._result import Campaign
from jaxfi.campaign._sample import Sample, reordered
from jaxfi.campaign._workers import (
    Block,
    Price,
    by_leaf,
    run_blocks,
    run_checked,
    split_blocks,
    start_workers,
)
from jaxfi.engine._cache import programs_kept
from jaxfi.engine._choice import chosen_plans, plan_text, seconds_to_compile
from jaxfi.engine._compilation import own_settings
from jaxfi.engine._engines import typical_plans, whole_programs
from jaxfi.engine._explain import LeafCost, leaf_costs
from jaxfi.engine._golden import Setup, golden_run, network_function
from jaxfi.engine._kept import kept
from jaxfi.engine._plan import mixes_images, part_of_layer, plan_leaves
from jaxfi.engine._questions import Criterion
from jaxfi.faults._list import FaultList
from jaxfi.faults._sampling import ExhaustiveFaults
from jaxfi.faults._transforms import PyTree
from jaxfi.network._frozen import frozen
from jaxfi.network._graph import ApplyFn, trace_network
from jaxfi.network._loops import has_open_loop, with_loop_limit
from jaxfi.outcomes._outcomes import Results

# Saved together; the results do not depend on it.
FAULTS_PER_BLOCK, _MOST_FAULTS_PER_BLOCK = 2048, 2**16
_PAIRS_PER_BLOCK = 2**22
_LOOK_EVERY = 0.5  # seconds between two looks at what the other processes have finished


def run_campaign(
    apply_fn: ApplyFn,
    params: PyTree,
    faults: FaultList,
    images: Any,
    labels: Any,
    *,
    nan: str = "critical",
    engine: str = "fast",
    batch_size: int = 100,
    precision: str = "highest",
    memory_budget: int | None = None,
    seed: int = 0,
    images_per_fault: int | None = None,
    keep: str = "outcomes",
    criteria: Mapping[str, Criterion] | None = None,
    loop_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
    workdir: str | os.PathLike | None = None,
) -> Any:
    """Runs every fault on every image, or on some drawn for it.

    Args:
      apply_fn: pure; maps `params` and images [batch, ...] to outputs [batch, classes]; with
        criteria to any tree of arrays [batch, ...].
      params: any pytree of float or integer arrays; faults go into these.
      faults: F faults in `params`, or experiments of several faults together
        (`FaultList.grouped`): then each is a row of the result.
      images: [N, ...], or a tree of such arrays (a dict, or a tuple of them): ids and mask.
      labels: [N] integers; None where nothing asks for them, accuracies are then NaN. Where
        criteria ask for other targets, a tree of arrays [N, ...].
      nan: "critical" counts a changed output with a NaN as critical; "argmax" goes by the argmax
        of NaN, as published tools do.
      engine: "fast", "reference" (one fault at a time), or "vmap".
      batch_size: images per batch. It fixes the shapes, so the last bits: part of the result.
      precision: of matmuls and convolutions: "highest" (float32), "high", "default" (a GPU's TF32).
      memory_budget: bytes of each device; default 70 % of what it reports, or of the machine.
      seed: of the null faults that check the run, and of the images that are drawn.
      images_per_fault: m images are drawn for each fault without replacement, seeded; a rate needs
        few (docs/sampled.md). The outcomes are then [F, m], those of the same pairs in a campaign
        of all; `Campaign.images` says which. By default, and of m = N, all images.
      keep: "outcomes" of every pair, a `Campaign`; or "counts", how many images of each fault had
        which, a `CampaignCounts`: for maps of every bit of every weight, of which
        `exhaustive_faults` is a list that takes no memory.
      criteria: what else is asked of each pair, by name: functions such as those of
        `jaxfi.criteria`, `fn(golden, faulty, targets) -> [batch] bool`, pure, and each image by
        itself. `Campaign.rate` gives the share of pairs that meet one. Where the outputs are not
        one float array [batch, classes], the first one says what is critical, in place of the
        argmax; one that is called "critical" always does. Masked and DUE do not change.
      loop_limit: turns after which a loop whose end depends on parameters or images counts as
        endless, a hang: its outputs are NaN, a DUE. Default 100 times what the fault-free network
        takes at most.
      devices: where to run, of one kind and this process's own; default all local accelerators, or
        one CPU. Blocks of faults go to whichever is free. The outcomes do not depend on how many.
      progress: show a progress bar with rate and ETA.
      workdir: a directory that keeps finished work; the same campaign there is continued. The
        processes of a job (`jaxfi.campaign.join_job`) share it, and each returns the whole.

    Raises ValueError or TypeError, before any work, for arguments that do not fit; NotReproducible
    if a null fault is not masked. With a workdir: ValueError that names what differs from the
    campaign there, or the file that is damaged; BlockingIOError if another process has it; OSError.

    >>> params = {"w": np.eye(2, dtype=np.float32)}
    >>> faults = FaultList.from_sites([("w", (0, 0), 31), ("w", (0, 1), 0)], params)
    >>> images = np.array([[2.0, 1.0], [0.5, 1.0]], np.float32)
    >>> result = run_campaign(lambda p, x: x @ p["w"], params, faults, images, [0, 1])
    >>> result.outcomes.tolist()
    [[2, 1], [0, 0]]
    """
    check_choices(engine, precision, nan, seed, keep)
    if criteria and keep == "counts":
        raise ValueError('criteria are of pairs: allowed with them is keep="outcomes"')
    apply_fn = frozen(apply_fn)
    check_faults(faults, params)
    devices = checked_devices(devices, workdir)
    arithmetic = jax.default_matmul_precision(precision)
    with own_settings(), programs_kept(), arithmetic, jax.default_device(devices[0]):
        inputs = checked_inputs(
            apply_fn, params, images, labels, batch_size, devices[0], nan, criteria
        )
        apply_fn, params, batches, labels, network, questions, targets, *_ = inputs
        if images_per_fault is not None:
            check_images_per_fault(images_per_fault, len(labels))
        if has_open_loop(network):
            loop_limit = checked_loop_limit(loop_limit, apply_fn, params, batches)
            apply_fn = inputs.trees(with_loop_limit(inputs.of_trees, loop_limit))
            batch = jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)
            network = trace_network(apply_fn, params, batch)
        network, programs = kept(network)
        counts = faults.counts_by_leaf()
        leaves = np.flatnonzero(counts).tolist() if engine == "fast" else []
        plans = plan_leaves(network, leaves)
        costs = leaf_costs(network, typical_plans(network, plans, faults), counts)
        own_batches, batch_size = batches, batches.shape[1]
        sample = order = None
        if images_per_fault is not None and images_per_fault < len(labels):
            mixes = bool(mixes_images(network, [network.image], []))
            sample = Sample(faults, len(labels), images_per_fault, batch_size, seed, in_order=mixes)
            order = sample.order
            batches, labels = reordered(batches, order), labels[order]
            targets = jax.tree.map(lambda array: array[order], targets)
        num_images = len(labels) if sample is None else sample.count
        together = faults_together(keep, len(faults), num_images)
        of_fault = num_images * (3 + len(questions.criteria)) // 3
        of_fault = of_fault if keep == "outcomes" else len(Counts._fields)
        num_kept = of_fault * len(faults) + num_images * together
        memory = checked_memory(memory_budget, devices, num_kept, costs)
        function = network_function(network)
        numbers = range(len(batches)) if sample is None else sample.batches()
        whole, _ = whole_programs(programs, function)
        first = golden_run(whole, params, batches, len(labels), numbers)
        golden = first.outputs
        run = functools.partial(whole, params)
        last = None
        if numbers[-1] == len(batches) - 1:
            last = golden[len(golden) - len(golden) % batch_size :]
        check_last_batch(network, run, batches, len(labels), last)
        warn_of_idle_faults(network, counts)
        warn_of_non_finite(questions, golden)
        held = len(batches) if sample is None else sample.batches_of_a_fault()
        plans = chosen_plans(network, plans, costs, programs, first, batch_size, held, num_images)
        setup = Setup(
            network, function, params, batches, labels, golden, questions, memory, plans, order,
            targets, programs,
        )  # fmt: skip
        # Of the plans, which depend on shapes alone: each process of a job sees the same blocks.
        prices = {leaf: leaf_price(cost) for leaf, cost in zip(leaves, costs, strict=True)}
        work = _Work(
            setup, faults, _activated(faults, params), engine, seed, devices, prices, sample,
            keep, together,
        )  # fmt: skip
        provenance = _provenance(work, precision)
        with _open_ledger(workdir, provenance, work) as ledger:
            for rows in ledger.unclaimed(work.idle()):
                ledger.write(rows, work.kept(work.masked(rows)))
            if progress and costs:
                costs = leaf_costs(network, plans.values(), counts)
                wait = seconds_to_compile(network, plans, programs, first)
                work_of = first.seconds_per_image, batch_size, held, num_images
                plan = plan_text(costs, len(batches), memory, work_of, wait)
                print(plan, file=sys.stderr)
            subject = provenance["params_sha256"], provenance["images_sha256"]
            _run_unfinished(ledger, work, subject, progress)
            results = ledger.results()
        arrays = work.arrays()
    if isinstance(results, Counts):
        golden, labels = arrays["golden"], arrays["labels"]
        return CampaignCounts(faults, *results, num_images, golden, labels, provenance, sample)
    if questions.layout is not None:
        arrays["golden"] = questions.outputs(arrays["golden"])
    audited = Subject(network, params, own_batches, precision, questions, inputs.targets)
    return Campaign(
        faults,
        *results[:3],
        provenance=provenance,
        pairs_correct=results.pairs_correct,
        criteria=dict(results.criteria),
        **arrays,
        _subject=audited,
    )


def faults_together(keep: str, num_faults: int, num_images: int) -> int:
    """Faults that are run and saved together: of counts, as many as take little memory."""
    most = FAULTS_PER_BLOCK
    if keep == "counts":
        most = min(max(most, _PAIRS_PER_BLOCK // num_images), _MOST_FAULTS_PER_BLOCK)
    return min(num_faults, most)


def _activated(faults: FaultList, params: PyTree) -> np.ndarray:
    """[F] bool: the fault changes the stored word."""
    if not isinstance(faults, ExhaustiveFaults):
        return faults.activated(params)
    activated = np.ones(len(faults), bool)
    if faults.rule_model != "bit-flip":
        for start in range(0, len(faults), _MOST_FAULTS_PER_BLOCK):
            rows = slice(start, start + _MOST_FAULTS_PER_BLOCK)
            activated[rows] = faults[rows].activated(params)
    return activated


class _Work(NamedTuple):
    """What a campaign runs, and where; faults that are not `activated` [F] need no run.

    `prices` of the leaves are the plan's, where the engine has one.
    """

    setup: Setup
    faults: FaultList
    activated: np.ndarray
    engine: str
    seed: int
    devices: Sequence[jax.Device]
    prices: Mapping[int, Price]
    sample: Sample | None
    keep: str
    together: int

    @property
    def num_images(self) -> int:
        """Of each fault."""
        return self.setup.num_images if self.sample is None else self.sample.count

    def blocks(self) -> list[Block]:
        """Of all faults, not only the unfinished: every process must see the same blocks."""
        num_workers = len(self.devices) * jax.process_count()
        blocks = split_blocks(self._rows_of_leaves(), self.together, num_workers, self.prices)
        if self.activated.all():
            return blocks
        run = (rows[self.activated[rows]] for rows in map(np.asarray, blocks))
        return [rows for rows in run if len(rows)]

    def _rows_of_leaves(self) -> dict[int, Block]:
        """Of each leaf, its faults, those in one block of a layer together."""
        faults = self.faults
        counts = faults.counts_by_leaf()
        if isinstance(faults, ExhaustiveFaults) and self.keep == "counts":
            # In the order of elements they are together.
            rows_of = {leaf: faults.rows_of_leaf(leaf) for leaf in np.flatnonzero(counts).tolist()}
            return {leaf: range(rows.start, rows.stop) for leaf, rows in rows_of.items()}
        rows = np.flatnonzero(self.activated)  # of which blocks are full
        part = part_of_layer(self.setup.network, self.setup.plans.values(), faults)
        return by_leaf(faults, rows[np.argsort(part[rows], kind="stable")])

    def idle(self) -> list[np.ndarray]:
        """Faults that change nothing, in blocks."""
        rows = np.flatnonzero(~self.activated)
        return [rows[n : n + self.together] for n in range(0, len(rows), self.together)]

    def nothing(self) -> Kept:
        """Room for all results."""
        shape = len(self.faults), self.num_images
        if self.keep == "counts":
            return no_counts(*shape)
        outcomes, due, correct = (
            np.empty(shape, np.uint8),
            np.empty(shape, bool),
            np.empty(shape, bool),
        )
        names = self.setup.questions.criteria
        criteria = {name: np.empty(shape, bool) for name in names}
        counts = np.empty(shape[0], np.int32)
        return Results(outcomes, due, counts, correct, criteria=criteria)

    def kept(self, results: Results) -> Kept:
        """What is kept of results."""
        return counts_of(results) if self.keep == "counts" else results

    def masked(self, rows: np.ndarray) -> Results:
        """Of faults that change nothing: golden's own."""
        if self.sample is None:
            count = self.setup.num_images
            pairs = np.broadcast_to(np.arange(count), (len(rows), count))
        else:
            pairs = self.sample.of(rows)
        outcome, due, correct, *criteria = (a[pairs] for a in self.setup.golden_answers)
        counts = correct.sum(axis=1, dtype=np.int32)
        named = dict(zip(self.setup.questions.criteria, criteria, strict=True))
        return Results(outcome, due, counts, correct, criteria=named)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is kept beside the outcomes: golden outputs and labels by image, and of sampled
        pairs the images; the outputs of images that no fault saw are NaN."""
        golden, labels = self.setup.golden, self.setup.labels
        if self.sample is None:
            return {"golden": golden, "labels": labels}
        own, seen = np.argsort(self.sample.order), self.sample.seen()
        nothing = self.setup.questions.nothing(golden)
        golden = np.where(seen[:, None], golden[own], nothing)
        kept = {"golden": golden, "labels": labels[own]}
        if self.keep == "counts":
            return {**kept, "order": self.sample.order}
        return {**kept, "images": self.sample.images}


def leaf_price(cost: LeafCost) -> Price:
    """By the plan: as if every pair survived. A block ends a group of columns that is not full."""
    return Price(cost.columns + cost.suffix, cost.columns * cost.group_size)


def _provenance(work: _Work, precision: str) -> dict[str, Any]:
    return {
        **fingerprint(work.setup, work.devices[0]),
        "engine": work.engine,
        "precision": precision,
        "seed": work.seed,
        "num_not_activated": int(np.count_nonzero(~work.activated)),
        **({} if work.sample is None else {"images_per_fault": work.num_images}),
        **({} if work.keep == "outcomes" else {"keep": work.keep}),
    }


@contextlib.contextmanager
def _open_ledger(
    workdir: str | os.PathLike | None, provenance: dict[str, Any], work: _Work
) -> Iterator[Ledger]:
    """What is finished so far."""
    if workdir is None:
        yield MemoryLedger(work.nothing())
        return
    is_rule = isinstance(work.faults, ExhaustiveFaults) and work.keep == "counts"
    with open_directory(
        workdir,
        provenance,
        work.faults,
        None if is_rule else work.faults.values(work.setup.params),
        work.arrays(),
        num_images=work.num_images,
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
        keep=work.keep,
        criteria=tuple(work.setup.questions.criteria),
    ) as ledger:
        yield ledger


def _run_unfinished(ledger: Ledger, work: _Work, subject: tuple[str, ...], progress: bool) -> None:
    """Runs blocks until none is unfinished, whoever finishes them."""
    unfinished = ledger.unfinished()
    if not unfinished.any():
        return
    workers = start_workers(work.setup, work.engine, work.devices, subject)
    run_block = functools.partial(
        run_checked, faults=work.faults, seed=work.seed, sample=work.sample
    )
    with _bar(int(unfinished.sum()) * work.num_images, progress) as advance:
        while True:
            blocks = ledger.unclaimed(work.blocks())
            for rows, results in run_blocks(workers, blocks, run_block, advance):
                ledger.write(rows, work.kept(results))
            if not ledger.unfinished().any():
                return
            time.sleep(_LOOK_EVERY)  # others work on the rest, or die and leave it


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, unit=" outcomes", unit_scale=True, disable=not progress) as bar:
        yield lambda count: bar.update(min(count, total - bar.n)) and None
