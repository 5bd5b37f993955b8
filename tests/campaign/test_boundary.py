"""What surrounds a pure function: state, settings, devices, shapes that happen to fit."""

from __future__ import annotations

import collections
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxfi
from jaxfi import FaultList

RANDOM = np.random.default_rng(0)
PARAMS = {"a": RANDOM.normal(size=(6, 8)).astype(np.float32),
          "b": RANDOM.normal(size=(8, 4)).astype(np.float32)}  # fmt: skip
IMAGES = RANDOM.normal(size=(20, 6)).astype(np.float32)
LABELS = RANDOM.integers(0, 4, 20)
FAULTS = jaxfi.sample_faults(0, PARAMS, 40)


def network(p, x):
    return jnp.maximum(x @ p["a"], 0) @ p["b"]


def run(apply_fn=network, params=PARAMS, faults=FAULTS, images=IMAGES, labels=LABELS, **settings):
    settings = {"batch_size": 5, **settings}
    return jaxfi.run_campaign(apply_fn, params, faults, images, labels, **settings)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return run(engine="reference").outcomes


# State


class Scaled:
    factor = 1.0

    def __call__(self, p, x):
        return network(p, x) * self.factor


@pytest.mark.parametrize("kind", ["closure", "attribute", "method", "jit", "dictionary"])
def test_the_function_is_what_it_is_now(kind, tmp_path) -> None:
    state, scaled = {"factor": 1.0}, Scaled()
    functions = {
        "closure": lambda p, x: network(p, x) * state["factor"],
        "attribute": scaled,
        "method": scaled.__call__,
        "jit": jax.jit(lambda p, x: network(p, x) * state["factor"]),
        "dictionary": lambda p, x: network(p, x) * jnp.asarray(state["factor"]),
    }
    apply_fn = functions[kind]
    trials, counts = jaxfi.draw_trials(0, PARAMS, 3, 1), [0, 3]
    before = run(apply_fn, workdir=tmp_path)
    jaxfi.cumulative_accuracy(apply_fn, PARAMS, trials, IMAGES, LABELS, counts)
    state["factor"] = scaled.factor = -3.0
    after = run(apply_fn)
    np.testing.assert_array_equal(after.golden, before.golden * np.float32(-3.0))
    result = jaxfi.cumulative_accuracy(apply_fn, PARAMS, trials, IMAGES, LABELS, counts)
    assert result.accuracy[0, 0] == pytest.approx(after.clean_accuracy)
    with pytest.raises(ValueError, match="holds another campaign: .*network_sha256"):
        run(apply_fn, workdir=tmp_path)


def test_what_a_loop_does_inside_is_in_the_fingerprint() -> None:
    def looped(step):
        return lambda p, x: network(p, jax.lax.fori_loop(0, 3, lambda _, h: h * step, x))

    digests = {run(looped(step)).provenance["network_sha256"] for step in (0.5, 0.25, 0.125)}
    swapped = {run(f, {"a": np.eye(6, dtype=np.float32), "b": np.eye(6, dtype=np.float32)},
                   FaultList.from_sites([("a", 0, 30)], {"a": np.eye(6, dtype=np.float32),
                                                         "b": np.eye(6, dtype=np.float32)}))
               .provenance["network_sha256"]
               for f in (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
                         lambda p, x: jnp.tanh(x @ p["b"]) @ p["a"])}  # fmt: skip
    assert len(digests) == 3
    assert len(swapped) == 2


@pytest.mark.parametrize("call", ["campaign", "explain", "cumulative"])
def test_a_function_that_ignores_its_parameters(call) -> None:
    def ignores(p, x):
        return network(PARAMS, x)

    calls = {
        "campaign": lambda: run(ignores),
        "explain": lambda: jaxfi.explain(ignores, PARAMS, FAULTS, IMAGES),
        "cumulative": lambda: jaxfi.cumulative_accuracy(
            ignores, PARAMS, [FAULTS], IMAGES, LABELS, [1]
        ),
    }
    with pytest.raises(ValueError, match="^apply_fn does not use params"):
        calls[call]()


def test_leaves_without_influence_and_golden_nan_are_told() -> None:
    params = {**PARAMS, "c": np.ones(3, np.float32)}
    faults = FaultList.from_sites([("c", 0, 30), ("c", 1, 30), ("a", 0, 30)], params)
    with pytest.warns(UserWarning, match=r"does not depend on c \(2\): .* masked by construction"):
        assert (run(params=params, faults=faults).outcomes[:2] == 0).all()
    images = IMAGES.copy()
    images[[3, 7]] = np.nan
    with pytest.warns(UserWarning, match="hold NaN or Inf for 2 of 20 images"):
        run(images=images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


# Batches


@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
@pytest.mark.parametrize(
    "mixes",
    [lambda h: h - h.mean(0, keepdims=True), lambda h: h / h.sum(),
     lambda h: jnp.cumsum(h[::-1], 0)[::-1],
     lambda h: jax.lax.scan(lambda s, r: (s, r - h.mean()), 0.0, h)[1]],
)  # fmt: skip
def test_a_batch_filled_up_with_copies_is_refused_where_they_count(mixes, engine) -> None:
    def apply_fn(p, x):
        return mixes(x @ p["a"]) @ p["b"]

    with pytest.raises(ValueError, match=r"mixes the images .* 20 images in batches of 8 .* 10$"):
        run(apply_fn, batch_size=8, engine=engine)
    run(apply_fn, batch_size=10, engine=engine)


# Settings, devices


@pytest.mark.parametrize(
    "setting",
    [jax.debug_nans(True), jax.debug_infs(True), jax.transfer_guard("disallow"), jax.disable_jit(),
     jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"),
     jax.default_prng_impl("rbg"), jax.default_matmul_precision("bfloat16"),
     jax.checking_leaks()],
    ids=lambda setting: str(getattr(setting, "name", setting))[:20],
)  # fmt: skip
def test_settings_of_the_session(setting, expected) -> None:
    with setting:
        outcomes = [run(engine=engine).outcomes for engine in ("fast", "reference", "vmap")]
        jaxfi.cumulative_accuracy(
            network, PARAMS, jaxfi.draw_trials(0, PARAMS, 9, 2), IMAGES, LABELS, [9]
        )
    for found in outcomes[:2]:
        np.testing.assert_array_equal(found, expected)


def test_arrays_that_are_elsewhere(expected) -> None:
    mesh = Mesh(np.array(jax.devices()), ("d",))
    there = {
        "sharded": NamedSharding(mesh, PartitionSpec("d")),
        "replicated": NamedSharding(mesh, PartitionSpec()),
        "other": jax.devices()[1],
    }
    for place in there.values():
        params, images = jax.device_put(PARAMS, place), jax.device_put(IMAGES, place)
        for engine in ("fast", "reference"):
            np.testing.assert_array_equal(
                run(params=params, images=images, engine=engine).outcomes, expected
            )
    closed = jax.device_put(jnp.float32(1), jax.devices()[1])
    np.testing.assert_array_equal(run(lambda p, x: network(p, x) * closed).outcomes, expected)


def test_a_deleted_array_is_named() -> None:
    params = jax.tree.map(jnp.asarray, PARAMS)
    params["b"].delete()
    with pytest.raises(ValueError, match="^leaf b was deleted"):
        run(params=params)
    images = jnp.asarray(IMAGES)
    images.delete()
    with pytest.raises(ValueError, match="^images was deleted"):
        run(images=images)


# Shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    logits: jax.Array


@dataclasses.dataclass
class PlainOutput:
    logits: jax.Array
    hidden: jax.Array | None = None


Pair = collections.namedtuple("Pair", ["logits"])


@pytest.mark.parametrize(
    "container",
    [lambda y: (y,), lambda y: [y], lambda y: {"logits": y}, Output, PlainOutput, Pair,
     lambda y: (y, {}), lambda y: {"out": [None, (y,)]}],
)  # fmt: skip
def test_one_array_in_any_container(container, expected) -> None:
    def apply_fn(p, x):
        return container(network(p, x))

    for engine in ("fast", "reference"):
        np.testing.assert_array_equal(run(apply_fn, engine=engine).outcomes, expected)
    assert jaxfi.explain(apply_fn, PARAMS, IMAGES)[0].method == "columns"
    assert jaxfi.neuron_outputs(apply_fn, PARAMS, IMAGES)
    result = jaxfi.cumulative_accuracy(apply_fn, PARAMS, [FAULTS], IMAGES, LABELS, [0])
    assert result.accuracy[0, 0] == pytest.approx((run().golden.argmax(-1) == LABELS).mean())


@pytest.mark.parametrize(
    "outputs, error, message",
    [
        (lambda y: y[:, :1], ValueError, "one column, whose argmax is always class 0"),
        (lambda y: y[:, 0], ValueError, r"allowed is one float array \[batch, classes\]"),
        (lambda y: (y, y), ValueError, r"float32\[5,4\], float32\[5,4\] .*allowed is one float"),
        (lambda y: y[:, None], ValueError, "allowed is one float array"),
        (lambda y: (y * 8).astype(jnp.int32), ValueError, r"int32\[5,4\]"),
        (lambda y: y.argmax(-1), ValueError, r"int32\[5\]"),
        (lambda y: y.T, ValueError, "allowed is one float array"),
        (lambda y: None, ValueError, "returned nothing"),
        (lambda y: "logits", TypeError, "returned something of type str: allowed is one"),
        (lambda y: {}, ValueError, "returned nothing"),
    ],
)
def test_outputs_that_are_none(outputs, error, message) -> None:
    with pytest.raises(error, match=message):
        run(lambda p, x: outputs(network(p, x)))
    with pytest.raises(error, match=message):
        jaxfi.cumulative_accuracy(
            lambda p, x: outputs(network(p, x)), PARAMS, [FAULTS], IMAGES[:5], LABELS[:5], [1]
        )


@pytest.mark.parametrize(
    "labels, error, message",
    [
        (LABELS + 1, ValueError, "labels hold 4: allowed are the network's classes, 0 to 3"),
        (LABELS - 1, ValueError, "labels hold -1"),
        (np.full(20, 2**40), ValueError, "labels hold 1099511627776"),
        (np.full(20, 2**63, np.uint64), ValueError, "labels hold 9223372036854775808"),
        (np.eye(4, dtype=int)[LABELS], ValueError, r"labels have shape \(20, 4\)"),
        (LABELS[:, None], ValueError, r"labels have shape \(20, 1\)"),
        (LABELS * 1.0, TypeError, "labels have dtype float64"),
        (LABELS > 1, TypeError, "labels have dtype bool"),
        (list("abcd") * 5, TypeError, "labels have dtype"),
    ],
)
def test_labels_that_are_no_classes(labels, error, message) -> None:
    with pytest.raises(error, match=message):
        run(labels=labels)
    with pytest.raises(error, match=message):
        jaxfi.cumulative_accuracy(network, PARAMS, [FAULTS], IMAGES, labels, [1])


@pytest.mark.parametrize(
    "leaf, message",
    [
        (jax.random.key(0), "leaf drop is a random key: take it out .*nnx.split and eqx.partition"),
        (np.ones(3, bool), "leaf drop is bool, a mask: take it out"),
        (jnp.ones(3, jnp.int4), "leaf drop has dtype int4: .*; int8 holds its values"),
        (
            np.ones(3, np.complex64),
            "leaf drop has dtype complex64: allowed are floats",
        ),
        (np.array(["a"]), "leaf drop has dtype <U1"),
        (1.0, "leaf drop is a float: allowed are arrays"),
    ],
)
def test_leaves_that_hold_no_words_are_named(leaf, message) -> None:
    params = {**PARAMS, "drop": leaf}
    for call in (
        lambda: jaxfi.sample_faults(0, params, 3),
        lambda: jaxfi.fault_population(params),
        lambda: run(params=params),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            call()


@pytest.mark.parametrize(
    "call",
    [lambda p, x: run(params=p), lambda p, x: run(images=x),
     lambda p, x: jaxfi.explain(network, p, x),
     lambda p, x: jaxfi.cumulative_accuracy(network, p, [FAULTS], x, LABELS, [1], batch_size=5)],
    ids=["params", "images", "explain", "cumulative"],
)  # fmt: skip
@pytest.mark.parametrize("inside", [jax.jit, jax.vmap, jax.grad, jax.checkpoint])
def test_inside_a_transform_it_is_one_line(call, inside) -> None:
    def function(p, x):
        call(p, x)
        return jnp.float32(0)

    arguments = PARAMS, IMAGES
    if inside is jax.vmap:
        arguments = jax.tree.map(lambda leaf: leaf[None], arguments)
    with pytest.raises(ValueError, match=r"^this needs values, and cannot run inside jit, grad"):
        inside(function)(*arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"images": np.ma.masked_greater(IMAGES, 1)}, "^images: masked values have no place here"),
        ({"labels": np.ma.masked_equal(LABELS, 1)}, "^labels: masked values have no place here"),
        (
            {"params": {**PARAMS, "a": np.ma.masked_greater(PARAMS["a"], 1)}},
            "^leaf a: masked values have no place here",
        ),
        ({"faults": FAULTS.fault(0)}, "^faults are a Fault: allowed is a FaultList"),
        ({"apply_fn": PARAMS}, "^apply_fn is a dict: allowed is a function"),
        ({"images": [[1, 2], [3]]}, "^images are no array"),
    ],
)
def test_what_is_no_argument_is_named(changed, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(**changed)


def test_an_array_without_masked_values_is_an_array(expected) -> None:
    found = run(images=np.ma.masked_array(IMAGES))
    np.testing.assert_array_equal(found.outcomes, expected)


# More than a function


def with_a_ref(p, x):
    ref = jax.new_ref(x @ p["a"])
    ref[...] = jnp.maximum(ref[...], 0)
    return ref[...] @ p["b"]


def with_a_mesh(p, x):
    mesh, spec = jax.make_mesh((1,), ("i",)), PartitionSpec()
    both = lambda a, x: jnp.maximum(x @ a, 0)  # noqa: E731
    return jax.shard_map(both, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(p["a"], x) @ p["b"]


def with_a_solver(p, x):
    matvec = lambda v: v + 0.1 * (v @ (p["b"] @ p["b"].T))  # noqa: E731
    return jax.scipy.sparse.linalg.cg(matvec, jnp.maximum(x @ p["a"], 0))[0] @ p["b"]


@pytest.mark.parametrize(
    "function, message",
    [
        (with_a_ref, "which reads or writes a mutable array: allowed are functions without"),
        (with_a_mesh, "shard_map, which divides a batch by devices: allowed are networks"),
        (with_a_solver, "with a loop inside, which a fault could keep from ending"),
    ],
)
def test_more_than_a_function_is_named(function, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(function)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_function_with_its_own_vmap_is_what_it_calls(engine, expected) -> None:
    @jax.custom_batching.custom_vmap
    def layer(a, x):
        return jnp.maximum(x @ a, 0)

    @layer.def_vmap
    def _(axis_size, in_batched, a, x):
        raise AssertionError("a campaign of the network's own batches needs no other")

    found = run(lambda p, x: layer(p["a"], x) @ p["b"], engine=engine)
    np.testing.assert_array_equal(found.outcomes, expected)
