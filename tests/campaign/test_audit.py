"""The audit against NumPy's arithmetic, and on campaigns that were tampered with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfi
from tests.conformance_models import plain_conv, plain_mlp, wide_layers
from tests.engine.test_conformance import faults_in_every_leaf

RANDOM = np.random.default_rng(0)
SCORES = {"w": RANDOM.normal(size=(6, 6)).astype(np.float32) * 0.5}
X = RANDOM.normal(size=(8, 6)).astype(np.float32)
SCALE = np.float32(0.4082483)


def numpy_outcomes(scaled, faults) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: float32, one operation after the other. XLA's exponential is not NumPy's to the
    last bit, so only DUE and the argmax are compared."""

    def outputs(w):
        with np.errstate(all="ignore"):
            products = np.stack([X[:, k : k + 1] * w[k] for k in range(6)])
            scores = scaled(np.sum(products, axis=0, dtype=np.float32))
            shifted = np.exp(scores - scores.max(-1, keepdims=True))
            return shifted / shifted.sum(-1, keepdims=True)

    golden = outputs(SCORES["w"]).argmax(-1)
    faulty = [
        outputs(np.asarray(jaxfi.inject(SCORES, faults.fault(n))["w"])) for n in range(len(faults))
    ]
    due = ~np.isfinite(faulty).all(-1)
    return due, (np.stack([f.argmax(-1) for f in faulty]) != golden) | np.isnan(faulty).any(-1)


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(
    "name, scaled",
    [("times", lambda s: s * SCALE), ("over", lambda s: s / np.float32(2.4494897)),
     ("half", lambda s: s * np.float32(0.5)), ("plain", lambda s: s),
     ("twice", lambda s: s * SCALE * np.float32(1.7))],
)  # fmt: skip
def test_softmax_of_scaled_scores_is_not_contracted(engine, name, scaled) -> None:
    faults = jaxfi.exhaustive_faults(SCORES, bits=[29, 30])
    due, critical = numpy_outcomes(scaled, faults)
    campaign = jaxfi.run_campaign(
        lambda p, x: jax.nn.softmax(scaled(x @ p["w"]), -1), SCORES, faults, X, np.zeros(8, int),
        engine=engine,
    )  # fmt: skip
    np.testing.assert_array_equal(campaign.due, due)
    assert np.mean((campaign.outcomes == 2) != critical) < 0.01
    assert campaign.audit(100).agrees.all()


@pytest.mark.filterwarnings("ignore:the fault-free network's outputs hold NaN")
@pytest.mark.parametrize(
    "tail",
    [jax.nn.log_softmax, lambda s: s - jax.nn.logsumexp(s * SCALE, axis=-1, keepdims=True),
     lambda s: jax.nn.softmax(jnp.where(s > 0, s * SCALE, -jnp.inf)) + 0 * s,
     lambda s: jax.nn.softmax(s * SCALE) @ s[:6]],
    ids=["log_softmax", "logsumexp", "masked", "attention"],
)  # fmt: skip
def test_due_is_op_by_op_where_exponents_flip(tail) -> None:
    faults = jaxfi.exhaustive_faults(SCORES, bits=[29, 30])
    campaign = jaxfi.run_campaign(
        lambda p, x: tail(x @ p["w"]), SCORES, faults, X, np.zeros(8, int)
    )
    audit = campaign.audit(150)
    np.testing.assert_array_equal(audit.due, audit.audited_due)


@pytest.mark.parametrize("model", [plain_mlp, plain_conv, wide_layers], ids=lambda m: m.__name__)
def test_the_engines_networks_agree(model) -> None:
    apply_fn, params, shape = model()
    images = RANDOM.normal(size=(13, *shape)).astype(np.float32)
    faults = faults_in_every_leaf(params)
    campaign = jaxfi.run_campaign(apply_fn, params, faults, images, np.zeros(13, int), batch_size=5)
    audit = campaign.audit(60, key=3)
    assert len(np.unique(audit.pairs, axis=0)) == 60
    assert "of 60 pairs agree" in repr(audit)
    assert "\n" not in repr(audit)
    assert (audit.due == audit.audited_due).all()
    critical = (audit.outcomes == 2) == (audit.audited == 2)
    assert critical.mean() > 0.95
    again = campaign.audit(60, key=3)
    np.testing.assert_array_equal(again.pairs, audit.pairs)


def test_what_was_tampered_with_is_found() -> None:
    apply_fn, params, shape = plain_mlp()
    images = RANDOM.normal(size=(10, *shape)).astype(np.float32)
    faults = faults_in_every_leaf(params)
    campaign = jaxfi.run_campaign(apply_fn, params, faults, images, np.zeros(10, int), batch_size=5)
    whole = campaign.audit(10**6)
    assert len(whole.pairs) == campaign.outcomes.size
    outcomes = campaign.outcomes.copy()
    outcomes[::2] = (outcomes[::2] + 1) % 3
    audit = dataclasses.replace(campaign, outcomes=outcomes).audit(80)
    changed = audit.pairs[:, 0] % 2 == 0
    assert not audit.agrees[changed].any()
    assert audit.disagreement.low < changed.mean() < audit.disagreement.high


def test_a_loaded_campaign_has_no_network(tmp_path) -> None:
    faults = jaxfi.sample_faults(0, SCORES, 5)
    arguments = (lambda p, x: x @ p["w"], SCORES, faults, X, np.zeros(8, int))
    run = jaxfi.run_campaign(*arguments, workdir=tmp_path)
    assert run.audit(5).agrees.all()
    with pytest.raises(ValueError, match="a loaded campaign has no network"):
        jaxfi.load_campaign(tmp_path).audit(5)
    assert jaxfi.run_campaign(*arguments, workdir=tmp_path).audit(5).agrees.all()
    with pytest.raises(ValueError, match="num_pairs 0 is out of range"):
        run.audit(0)
