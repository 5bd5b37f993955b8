"""What a campaign asks beside its outcomes, and networks of trees: engines, store, sample, errors.

The oracle evaluates fault by fault: inject, run, and ask in NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfi
from jaxfi import criteria
from tests import conformance_models as models

NUM_IMAGES, BATCH = 30, 10
ENGINES = "fast", "reference", "vmap"


def images_like(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_IMAGES, *shape)).astype(np.float32)


def labels_of(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, models.CLASSES, NUM_IMAGES)


def one_by_one(apply_fn: Callable, params: Any, faults: jaxfi.FaultList, images: Any) -> tuple:
    """Golden outputs, and faulty ones of each fault, in the batches of a campaign."""
    network = jax.jit(apply_fn)

    def of(params: Any) -> Any:
        starts = range(0, NUM_IMAGES, BATCH)
        parts = [network(params, jax.tree.map(lambda a: a[n : n + BATCH], images)) for n in starts]  # noqa: B023
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)

    faulty = [of(jaxfi.inject(params, faults.fault(row))) for row in range(len(faults))]
    return of(params), jax.tree.map(lambda *a: np.stack(a), *faulty)


def pairs_and_image(params: Any, images: dict) -> dict:
    """Ids look up a table, a mask says which count, an image is convolved; two outputs."""
    rows = params["table"][images["ids"]] * images["mask"][..., None]
    scale = jax.nn.relu(rows.sum(axis=1) @ params["mix"])
    features = jax.nn.relu(models.conv(images["image"], params["kernel"]))
    logits = (features.mean(axis=(1, 2)) + scale) @ params["head"]
    return {"logits": logits, "best": jnp.argmax(logits, axis=1), "scale": scale}


PARAMS = {
    "table": models.normal(0, 11, 6, scale=0.5), "mix": models.normal(1, 6, 8),
    "kernel": models.normal(2, 3, 3, 2, 8), "head": models.normal(3, 8, models.CLASSES),
}  # fmt: skip


def tree_images() -> dict:
    random = np.random.default_rng(5)
    return {
        "ids": random.integers(0, 9, (NUM_IMAGES, 4)),  # two rows of the table are never read
        "mask": random.random((NUM_IMAGES, 4)) < 0.7,
        "image": random.normal(size=(NUM_IMAGES, 5, 5, 2)).astype(np.float32),
    }


def mispredicts(golden: jax.Array, faulty: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.argmax(faulty, axis=1) != targets


ASKED = {"sdc2": criteria.top_k(2), "sdc10": criteria.confidence_drop(0.1), "wrong": mispredicts}


@pytest.mark.parametrize(
    "make",
    [
        models.linen_cnn, models.recurrent,
        pytest.param(models.vision_transformer, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_engines_answer_as_one_by_one(make: Callable) -> None:
    apply_fn, params, shape = make()
    images, labels = images_like(shape), labels_of()
    faults = jaxfi.sample_faults(0, params, 60)
    found = [
        jaxfi.run_campaign(apply_fn, params, faults, images, labels, criteria=ASKED,
                           batch_size=BATCH, engine=engine, nan="argmax")
        for engine in ENGINES
    ]  # fmt: skip
    plain = jaxfi.run_campaign(
        apply_fn, params, faults, images, labels, batch_size=BATCH, nan="argmax"
    )
    for campaign in found[:2]:  # vmap's sums may be ordered otherwise
        assert np.array_equal(campaign.outcomes, plain.outcomes)
        assert np.array_equal(campaign.due, plain.due)
        assert np.array_equal(campaign.correct, plain.correct)
        for name in ASKED:
            assert np.array_equal(campaign.criteria[name], found[0].criteria[name]), name
    assert np.array_equal(found[0].criteria["wrong"], ~found[0].pairs_correct)
    golden, faulty = one_by_one(apply_fn, params, faults, images)
    top = np.argsort(-golden, axis=1, kind="stable")[:, :2]
    expected = ~(faulty.argmax(axis=2)[..., None] == top[None]).any(axis=2)
    tame = np.isfinite(faulty).all(axis=2)
    near = np.sort(faulty, axis=2)
    tame &= near[..., -1] - near[..., -2] > 1e-4  # what the compilers round apart
    assert np.array_equal(found[0].criteria["sdc2"][tame], expected[tame])
    rate = found[0].rate("sdc2")
    assert rate.value == pytest.approx(found[0].criteria["sdc2"].mean())
    assert rate.low <= rate.value <= rate.high


def test_trees_in_and_out() -> None:
    images = tree_images()
    faults = jaxfi.exhaustive_faults(PARAMS, paths=["table"], bits=[30, 22]) + jaxfi.sample_faults(
        3, PARAMS, 80
    )
    asked = {
        "sdc1": criteria.on("logits", criteria.argmax),
        "best": lambda golden, faulty, targets: golden["best"] != faulty["best"],
        "scale": criteria.on("scale", criteria.absolute_error(0.01)),
    }
    given = {"criteria": asked, "batch_size": BATCH, "nan": "argmax"}
    fast, reference, vmapped = (
        jaxfi.run_campaign(pairs_and_image, PARAMS, faults, images, None, engine=engine, **given)
        for engine in ENGINES
    )
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert np.array_equal(fast.due, reference.due)
    for name in asked:
        assert np.array_equal(fast.criteria[name], reference.criteria[name])
    assert set(np.unique(fast.outcomes)) == {0, 1, 2}
    changed = fast.outcomes > 0
    assert np.array_equal(fast.outcomes == 2, fast.criteria["sdc1"] & changed)
    tame = ~fast.due  # of NaN the argmax is class 0, and the criterion is met
    assert np.array_equal(fast.criteria["sdc1"][tame], fast.criteria["best"][tame])
    unread = np.isin(faults.element // 6, [9, 10]) & (faults.leaf == faults.paths.index("table"))
    assert unread.any()
    assert not fast.outcomes[unread].any()
    assert np.array_equal(vmapped.criteria["sdc1"].shape, fast.outcomes.shape)
    golden, faulty = one_by_one(pairs_and_image, PARAMS, faults, images)
    assert {name: array.shape for name, array in fast.golden.items()} == {
        "logits": (NUM_IMAGES, models.CLASSES), "best": (NUM_IMAGES,), "scale": (NUM_IMAGES, 8)
    }  # fmt: skip
    assert fast.golden["best"].dtype == golden["best"].dtype
    np.testing.assert_allclose(fast.golden["logits"], golden["logits"], rtol=1e-5, atol=1e-6)
    with np.errstate(invalid="ignore"):
        moved = (np.abs(faulty["scale"] - golden["scale"]) > 0.0101).any(axis=2)
        still = (np.abs(faulty["scale"] - golden["scale"]) < 0.0099).all(axis=2)
    assert fast.criteria["scale"][moved].all()
    assert not fast.criteria["scale"][still].any()
    assert np.isnan(fast.clean_accuracy)
    assert np.isnan(fast.rates().faulty_accuracy.value)
    assert "accuracy" not in repr(fast)
    assert "sdc1" in repr(fast)
    assert len(jaxfi.explain(pairs_and_image, PARAMS, images, faults)) == 4
    assert fast.audit(40).agrees.all()


def test_a_tuple_of_arrays_and_16_bit_words_are_trees_too() -> None:
    images = tree_images()
    several = images["ids"].astype(np.int16), images["image"].astype(jnp.bfloat16)

    def apply_fn(params: Any, given: tuple) -> Any:
        ids, image = given
        assert (ids.dtype, image.dtype) == (jnp.int16, jnp.bfloat16)
        both = {"ids": ids.astype(jnp.int32), "image": image.astype(jnp.float32)}
        return pairs_and_image(params, {**both, "mask": jnp.ones(ids.shape, bool)})["logits"]

    plain = {"ids": images["ids"], "image": np.asarray(several[1], np.float32),
             "mask": np.ones_like(images["mask"])}  # fmt: skip
    faults = jaxfi.sample_faults(3, PARAMS, 80)
    packed = jaxfi.run_campaign(apply_fn, PARAMS, faults, several, labels_of(), batch_size=BATCH)
    named = jaxfi.run_campaign(
        lambda params, given: pairs_and_image(params, given)["logits"], PARAMS, faults, plain,
        labels_of(), batch_size=BATCH,
    )  # fmt: skip
    assert np.array_equal(packed.outcomes, named.outcomes)
    assert np.array_equal(packed.correct, named.correct)


def test_targets_may_be_a_tree() -> None:
    images = tree_images()
    targets = {"bound": np.linspace(0, 2, NUM_IMAGES, dtype=np.float32)}

    def above(golden: dict, faulty: dict, targets: dict) -> jax.Array:
        return faulty["scale"].max(axis=1) > targets["bound"]

    faults = jaxfi.sample_faults(3, PARAMS, 40)
    for few in (None, 4):
        found = jaxfi.run_campaign(
            pairs_and_image, PARAMS, faults, images, targets, criteria={"above": above},
            batch_size=BATCH, images_per_fault=few,
        )  # fmt: skip
        _, faulty = one_by_one(pairs_and_image, PARAMS, faults, images)
        highest = faulty["scale"].max(axis=2)
        expected, sure = highest > targets["bound"], abs(highest - targets["bound"]) > 1e-4
        if few:
            rows = np.arange(len(faults))[:, None]
            expected, sure = expected[rows, found.images], sure[rows, found.images]
        assert np.array_equal(found.criteria["above"][sure], expected[sure])
        assert found.outcomes.max() == 2  # the first criterion says what is critical


def test_one_output_has_a_threshold() -> None:
    def apply_fn(params: Any, images: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(jnp.tanh(images @ params["a"]) @ params["b"])

    params = {"a": models.normal(0, 6, 8), "b": models.normal(1, 8, 1)}
    images, faults = images_like((6,)), jaxfi.sample_faults(0, params, 300)
    with pytest.raises(ValueError, match="one column, whose argmax is always class 0.*criteria="):
        jaxfi.run_campaign(apply_fn, params, faults, images, None)
    found = jaxfi.run_campaign(
        apply_fn, params, faults, images, None, criteria={"decision": criteria.threshold(0.5)},
        batch_size=BATCH,
    )  # fmt: skip
    golden, faulty = one_by_one(apply_fn, params, faults, images)
    sure = np.abs(faulty[..., 0] - 0.5) > 1e-5
    expected = (faulty[..., 0] > 0.5) != (golden[:, 0] > 0.5)
    assert np.array_equal((found.outcomes == 2)[sure], expected[sure])
    assert found.rate("critical") == found.rate("decision")
    assert found.golden.shape == (NUM_IMAGES, 1)


def test_critical_can_be_named() -> None:
    apply_fn, params, shape = models.plain_mlp()
    images, faults = images_like(shape), jaxfi.sample_faults(0, params, 200)
    far = criteria.relative_error(0.5)
    named, plain = (
        jaxfi.run_campaign(
            apply_fn, params, faults, images, labels_of(), batch_size=BATCH, nan="argmax",
            criteria={name: far},
        )
        for name in ("critical", "far")
    )  # fmt: skip
    assert not named.criteria
    assert np.array_equal(named.outcomes == 2, plain.criteria["far"])
    assert np.array_equal(named.correct, plain.correct)
    assert np.array_equal(named.outcomes == 0, plain.outcomes == 0)


def test_labels_may_be_missing() -> None:
    apply_fn, params, shape = models.plain_mlp()
    images, faults = images_like(shape), jaxfi.sample_faults(0, params, 50)
    without = jaxfi.run_campaign(apply_fn, params, faults, images, None, batch_size=BATCH)
    labelled = jaxfi.run_campaign(apply_fn, params, faults, images, labels_of(), batch_size=BATCH)
    assert np.array_equal(without.outcomes, labelled.outcomes)
    assert (without.labels == -1).all()
    assert np.isnan(without.clean_accuracy)
    assert np.isnan(without.faulty_accuracy)
    assert "nan" not in repr(without)


def test_a_sample_has_the_answers_of_the_whole() -> None:
    apply_fn, params, shape = models.linen_cnn()
    images, faults = images_like(shape), jaxfi.sample_faults(0, params, 90)
    given = {"criteria": ASKED, "batch_size": BATCH}
    whole = jaxfi.run_campaign(apply_fn, params, faults, images, labels_of(), **given)
    some = jaxfi.run_campaign(
        apply_fn, params, faults, images, labels_of(), images_per_fault=4, **given
    )
    rows = np.arange(len(faults))[:, None]
    for name in ASKED:
        assert np.array_equal(some.criteria[name], whole.criteria[name][rows, some.images])
    low, high = some.rate("wrong").low, some.rate("wrong").high
    assert low <= whole.rate("wrong").value <= high


def test_a_directory_keeps_the_answers(tmp_path) -> None:
    images, faults = tree_images(), jaxfi.sample_faults(3, PARAMS, 70)
    asked = {
        "sdc1": criteria.on("logits", criteria.argmax),
        "zz": criteria.on("scale", criteria.absolute_error(0.01)),
        "aa": criteria.on("scale", criteria.relative_error(0.5)),
    }
    given = {"criteria": asked, "batch_size": BATCH, "workdir": tmp_path}
    found = jaxfi.run_campaign(pairs_and_image, PARAMS, faults, images, None, **given)
    again = jaxfi.run_campaign(pairs_and_image, PARAMS, faults, images, None, **given)
    loaded = jaxfi.load_campaign(tmp_path)
    for other in (again, loaded):
        assert list(other.criteria) == list(asked)
        for name in asked:
            assert np.array_equal(other.criteria[name], found.criteria[name])
            assert other.rate(name) == found.rate(name)
        assert np.array_equal(other.outcomes, found.outcomes)
        assert {n: a.tobytes() for n, a in other.golden.items()} == {
            n: a.tobytes() for n, a in found.golden.items()
        }
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(tmp_path / "results").sort_values("row")
    for name in asked:
        assert table[name].tolist() == found.criteria[name].sum(axis=1).tolist()
        assert found.to_pandas()[name].tolist() == table[name].tolist()
    table = found.rates(by="layer").to_pandas()
    assert {"sdc1", "sdc1_low", "sdc1_high"} <= set(table.columns)
    for change, message in [
        ({"sdc1": asked["sdc1"]}, "criteria"),
        ({**asked, "zz": criteria.on("scale", criteria.absolute_error(0.02))}, "criteria.zz is"),
    ]:
        with pytest.raises(ValueError, match=message):
            jaxfi.run_campaign(
                pairs_and_image, PARAMS, faults, images, None, **{**given, "criteria": change}
            )
    with pytest.raises(ValueError, match="targets_sha256 is"):
        jaxfi.run_campaign(pairs_and_image, PARAMS, faults, images, labels_of(), **given)


def test_rows_join_and_differ_in_pairs() -> None:
    apply_fn, params, shape = models.plain_mlp()
    images, faults = images_like(shape), jaxfi.sample_faults(0, params, 60)
    given = {"criteria": ASKED, "batch_size": BATCH}
    campaign = jaxfi.run_campaign(apply_fn, params, faults, images, labels_of(), **given)
    part = campaign[10:20]
    assert np.array_equal(part.criteria["sdc2"], campaign.criteria["sdc2"][10:20])
    chosen = campaign.rates(by="layer", images=np.arange(5))
    means = [np.average([p.criteria["sdc2"].value for p in chosen],
                        weights=[p.num_faults for p in chosen])]  # fmt: skip
    assert means[0] == pytest.approx(campaign.criteria["sdc2"][:, :5].mean())
    same = jaxfi.paired_difference(campaign, campaign, "sdc2")
    assert same.value == 0
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="unknown rate 'sdc3': allowed are .*sdc2, sdc10, wrong"):
        campaign.rate("sdc3")


@pytest.mark.parametrize("run", [jaxfi.run_sequential, jaxfi.run_stratified])
def test_adaptive_campaigns_stop_by_a_criterion(run: Callable) -> None:
    apply_fn, params, shape = models.plain_mlp()
    images = images_like(shape)
    found = run(apply_fn, params, images, None, criteria=ASKED | {"wrong": criteria.argmax},
                margin=0.08, rates=["sdc10", "masked"], batch_size=BATCH)  # fmt: skip
    for name in ("sdc10", "masked"):
        estimate = found.rate(name)
        assert estimate.high - estimate.low <= 0.16 + 1e-9
    assert found.rate("wrong").value == found.rates.critical.value
    assert np.isnan(found.rates.faulty_accuracy.value)
    whole = jaxfi.run_campaign(
        apply_fn, params, jaxfi.exhaustive_faults(params), images, None,
        criteria=ASKED | {"wrong": criteria.argmax}, batch_size=BATCH,
    )  # fmt: skip
    assert found.rate("sdc10").low <= whole.rate("sdc10").value <= found.rate("sdc10").high
    with pytest.raises(ValueError, match="rates is .*: allowed are some of .*sdc10, wrong"):
        run(apply_fn, params, images, None, criteria=ASKED, rates=["faulty_accuracy"])


def test_outputs_of_any_container_and_rank() -> None:
    apply_fn, params, shape = models.plain_mlp()
    images, faults = images_like(shape), jaxfi.sample_faults(0, params, 60)

    @dataclasses.dataclass
    class Output:
        logits: Any
        hidden: Any = None

    plain = jaxfi.run_campaign(apply_fn, params, faults, images, None, batch_size=BATCH)

    def of_square(golden: jax.Array, faulty: jax.Array, targets: None) -> jax.Array:
        flat = (array.reshape(len(array), 4) for array in (golden, faulty))
        return criteria.argmax(*flat)

    for wrap, criterion in [
        (lambda v: Output(v), criteria.argmax),
        (lambda v: {"logits": v}, criteria.argmax),
        (lambda v: {"logits": v}, criteria.on("logits", criteria.argmax)),
        (lambda v: Output(v, v[:, :1]), criteria.on("logits", criteria.argmax)),
        (lambda v: (v, None, v + 1), criteria.on(0, criteria.argmax)),
        (lambda v: v.reshape(-1, 2, 2), of_square),
    ]:
        found = jaxfi.run_campaign(
            lambda p, x, wrap=wrap: wrap(apply_fn(p, x)), params, faults, images, None,
            batch_size=BATCH, criteria={"sdc1": criterion},
        )  # fmt: skip
        assert np.array_equal(found.outcomes, plain.outcomes)


def test_a_loop_that_hangs_is_a_due_of_outputs_in_words() -> None:
    def apply_fn(params: Any, images: jax.Array) -> dict:
        start = images[:, 0] * 0 + params["start"]
        count = jax.lax.while_loop(
            lambda x: (x > 1).any(), lambda x: x * jnp.abs(params["step"]), start
        )
        return {"count": count + images @ params["w"], "index": jnp.zeros(len(images), int)}

    params = {"start": jnp.float32(64.0), "step": jnp.float32(0.5), "w": models.normal(0, 3)}
    faults = jaxfi.FaultList.from_sites(
        [("step", (), 23), ("w", (0,), 31)], params
    )  # step 1: endless
    found = jaxfi.run_campaign(
        apply_fn, params, faults, images_like((3,)), None, batch_size=BATCH,
        criteria={"far": criteria.on("count", criteria.absolute_error(0.1))},
    )  # fmt: skip
    assert found.due[0].all()  # the step is 1: endless
    assert (found.outcomes[0] == 2).all()
    assert not found.due[1].any()


def test_a_second_campaign_compiles_nothing() -> None:
    apply_fn, params, shape = models.linen_cnn()
    images, faults = images_like(shape), jaxfi.sample_faults(0, params, 40)

    def run() -> None:
        given = {"sdc2": criteria.top_k(2), "sdc10": criteria.confidence_drop(0.1)}
        jaxfi.run_campaign(
            apply_fn, params, faults, images, labels_of(), criteria=given, batch_size=BATCH
        )

    run()
    compiled: list[str] = []
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def never(golden: Any, faulty: Any, targets: Any) -> Any:
    return jnp.zeros(len(golden), bool)


count = iter(range(1000))


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"mine": lambda g, f, t: g}, r"'mine' returned float32\[10, 4\] for 10 images: "),
        ({"mine": lambda g, f, t: (g != f).any()}, r"'mine' returned bool\[\] for 10 images"),
        ({"mine": lambda g, f, t: g[:, 0] - f[:, 0]}, r"returned float32\[10\]"),
        ({"mine": lambda g, f, t: None}, "'mine' returned nothing"),
        ({"mine": lambda g, f, t: (never(g, f, t), never(g, f, t))}, r"bool\[10\], bool\[10\] for"),
        ({"mine": lambda g, f, t: g @ g}, "'mine' cannot be asked of outputs float32.10, 4.: "),
        ({"mine": lambda g, f: g}, "'mine' cannot be asked .*positional"),
        ({"mine": lambda g, f, t: f[:, 0] > next(count)}, "something else each time"),
        ({"mine": lambda g, f, t: f[:, 0] > f[:, 0].mean()}, "'mine' answers for an image by"),
        ({"top_9": criteria.top_k(9)}, "'top_9' cannot be asked .*: top_k.9. of 4 classes"),
        ({"masked": never}, "a criterion is called 'masked': allowed are names"),
        ({"row": never}, "a criterion is called 'row'"),
        ({"a b": never}, "a criterion is called 'a b'"),
        ({1: never}, "a criterion is called 1"),
        ({f"c{n}": never for n in range(29)}, "there are 29 criteria: allowed are up to 28"),
    ],
)  # fmt: skip
def test_what_is_no_criterion_is_named(asked: dict, message: str, tmp_path) -> None:
    apply_fn, params, shape = models.plain_mlp()
    faults = jaxfi.sample_faults(0, params, 5)
    with pytest.raises(ValueError, match=message):
        jaxfi.run_campaign(apply_fn, params, faults, images_like(shape), labels_of(),
                           criteria=asked, batch_size=BATCH, workdir=tmp_path / "new")  # fmt: skip
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("asked, message", [
    ([never], "criteria are a list: allowed is a dict"),
    ({"mine": "argmax"}, "'mine' is a str: allowed is a function"),
])  # fmt: skip
def test_what_is_no_function_is_named(asked: Any, message: str) -> None:
    apply_fn, params, shape = models.plain_mlp()
    faults = jaxfi.sample_faults(0, params, 5)
    with pytest.raises(TypeError, match=message):
        jaxfi.run_campaign(
            apply_fn, params, faults, images_like(shape), labels_of(), criteria=asked
        )


@pytest.mark.parametrize(
    "images, labels, message",
    [
        ({"ids": np.zeros((3, 2), int), "mask": np.zeros((4, 2), bool)}, None,
         r"images hold mask bool\[4, 2\]: allowed are arrays whose first axis"),
        ({}, None, "images hold no array"),
        ({"ids": np.array(["a"])}, None, "images/ids"),
        (tree_images(), {"a": np.zeros(3)}, r"labels hold an array of shape \(3,\): allowed is"),
    ],
)  # fmt: skip
def test_trees_that_do_not_fit_are_named(images: Any, labels: Any, message: str) -> None:
    faults = jaxfi.sample_faults(3, PARAMS, 5)
    with pytest.raises((ValueError, TypeError), match=message):
        jaxfi.run_campaign(
            pairs_and_image, PARAMS, faults, images, labels,
            criteria={"best": lambda g, f, t: g["best"] != f["best"]},
        )  # fmt: skip


def test_outputs_without_criteria_and_of_no_batch_are_named() -> None:
    faults, images = jaxfi.sample_faults(3, PARAMS, 5), tree_images()
    with pytest.raises(ValueError, match=r"apply_fn returned .*: allowed is one float .*criteria="):
        jaxfi.run_campaign(pairs_and_image, PARAMS, faults, images, None)

    def with_loss(params: Any, images: dict) -> dict:
        return {**pairs_and_image(params, images), "loss": jnp.float32(0)}

    asked = {"best": lambda g, f, t: g["best"] != f["best"]}
    with pytest.raises(ValueError, match=r"the outputs hold loss float32\[\]: allowed are arrays"):
        jaxfi.run_campaign(with_loss, PARAMS, faults, images, None, criteria=asked)
    with pytest.raises(ValueError, match="criteria are of pairs"):
        jaxfi.run_campaign(
            pairs_and_image, PARAMS, faults, images, None, criteria=asked, keep="counts"
        )


def sorted_by_image(golden: jax.Array, faulty: jax.Array, targets: Any) -> jax.Array:
    """Of a structure that does not show that images stay apart."""
    taken = jnp.zeros(golden.shape[1], bool)

    def of_image(one: jax.Array, other: jax.Array) -> jax.Array:
        def step(taken: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            best = jnp.argmin(jnp.where(taken, jnp.inf, jnp.abs(one - value)))
            return taken.at[best].set(True), best

        return jax.lax.scan(step, taken, other)[1]

    order = jax.vmap(of_image)
    return (order(golden, golden) != order(golden, faulty)).any(axis=1)


def test_what_cannot_be_seen_is_asked_image_by_image() -> None:
    apply_fn, params, shape = models.plain_mlp()
    faults = jaxfi.sample_faults(0, params, 150)
    given = apply_fn, params, faults, images_like(shape), None
    fast, reference = (
        jaxfi.run_campaign(*given, criteria={"order": sorted_by_image}, batch_size=BATCH, engine=e)
        for e in ENGINES[:2]
    )
    assert np.array_equal(fast.criteria["order"], reference.criteria["order"])
    assert fast.criteria["order"].any()
    audit = fast.audit(100)
    assert audit.agrees.all()
    wrong = dataclasses.replace(fast, criteria={"order": ~fast.criteria["order"]})
    assert not wrong.audit(100).agrees.any()


def test_criteria_that_close_over_other_values_are_others(tmp_path) -> None:
    apply_fn, params, shape = models.plain_mlp()
    faults = jaxfi.sample_faults(0, params, 60)

    def lost(which: np.ndarray) -> criteria.Criterion:
        chosen = jnp.asarray(which)
        return lambda g, f, t: (jnp.argmax(g, 1) == chosen) & (jnp.argmax(f, 1) != chosen)

    found = [
        jaxfi.run_campaign(apply_fn, params, faults, images_like(shape), None, batch_size=BATCH,
                           criteria={"lost": lost(np.int32(k))}).criteria["lost"].sum()
        for k in range(models.CLASSES)
    ]  # fmt: skip
    critical = jaxfi.run_campaign(
        apply_fn, params, faults, images_like(shape), None, batch_size=BATCH
    ).outcomes
    assert sum(found) == (critical == 2).sum()
    assert len(set(found)) > 1


def test_targets_that_would_be_cut_are_refused() -> None:
    apply_fn, params, shape = models.plain_mlp()
    targets = {"id": np.full(NUM_IMAGES, 2**32 + 1)}
    with pytest.raises(ValueError, match="labels hold 4294967297, which JAX cuts to 32 bits"):
        jaxfi.run_campaign(
            apply_fn, params, jaxfi.sample_faults(0, params, 5), images_like(shape), targets,
            criteria={"one": lambda g, f, t: t["id"] == 1},
        )  # fmt: skip


@pytest.mark.parametrize("run", ["sampled", "adaptive"])
def test_golden_outputs_of_sampled_trees_are_those_that_were_seen(run: str) -> None:
    images = tree_images()
    asked = {"best": lambda g, f, t: g["best"] != f["best"]}
    given = {"criteria": asked, "batch_size": BATCH}
    golden, _ = one_by_one(pairs_and_image, PARAMS, jaxfi.sample_faults(0, PARAMS, 1), images)
    if run == "sampled":
        faults = jaxfi.sample_faults(0, PARAMS, 4)
        found = jaxfi.run_campaign(
            pairs_and_image, PARAMS, faults, images, None, images_per_fault=2, **given
        )
    else:
        found = jaxfi.run_sequential(
            pairs_and_image, PARAMS, images, None, margin=0.2, first=10, images_per_fault=2,
            rates=["best"], **given,
        ).campaign  # fmt: skip
    seen = found.seen
    assert seen[found.images].all()
    np.testing.assert_allclose(found.golden["logits"][seen], golden["logits"][seen], rtol=1e-4)
    assert np.array_equal(found.golden["best"][seen], golden["best"][seen])
    assert np.isnan(found.golden["logits"][~seen]).all()


def test_regressions_have_a_critical_of_their_own() -> None:
    apply_fn, params, shape = models.plain_mlp()
    faults, ages = jaxfi.sample_faults(0, params, 60), np.full(NUM_IMAGES, 54)
    with pytest.raises(ValueError, match="labels hold 54: allowed are the network's classes"):
        jaxfi.run_campaign(apply_fn, params, faults, images_like(shape), ages)
    found = jaxfi.run_campaign(
        apply_fn, params, faults, images_like(shape), ages, batch_size=BATCH,
        criteria={"critical": criteria.relative_error(0.1)},
    )  # fmt: skip
    assert "critical " in repr(found)
    assert "(by your criterion 'critical')" in repr(found)
    assert (found.labels == -1).all()


def test_torch_tensors_are_images_everywhere() -> None:
    torch = pytest.importorskip("torch")
    apply_fn, params, shape = models.plain_mlp()
    images = torch.from_numpy(images_like(shape))
    assert len(jaxfi.explain(apply_fn, params, images, batch_size=BATCH)) == 6
    found = jaxfi.run_stratified(apply_fn, params, images, None, margin=0.2, batch_size=BATCH)
    assert found.rates.masked.value > 0


def test_answers_by_place_in_the_batch() -> None:
    apply_fn, params, shape = models.plain_mlp()

    def by_place(params: Any, images: jax.Array) -> jax.Array:
        return apply_fn(params, images) * (1 + 1e-3 * jnp.arange(len(images))[:, None])

    faults = jaxfi.sample_faults(0, params, 20)
    given = {"criteria": ASKED, "batch_size": BATCH}
    fast, reference = (
        jaxfi.run_campaign(
            by_place, params, faults, images_like(shape), labels_of(), engine=engine, **given
        )
        for engine in ENGINES[:2]
    )  # fmt: skip
    for name in ASKED:
        assert np.array_equal(fast.criteria[name], reference.criteria[name])
