"""What a compiler's contractions do to outcomes: DUEs of plain jit, of a campaign, of operations.

    python -m experiments.benchmarks.contraction

Every exponent bit of every weight in front of a softmax, a norm, ... is flipped, for 64 images.
Pairs (fault, image) with a NaN or Inf in the output are counted three times: the function under a
plain `jax.jit`, a campaign, and its audit, which runs one operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxfi

SCALE = np.float32(0.408)
WIDTH = 8


def _attention(scores: jax.Array) -> jax.Array:
    tokens = scores[:, :, None] * jnp.arange(1, 5, dtype=jnp.float32)
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", tokens, tokens) * SCALE)
    return jnp.einsum("bqk,bkd->bqd", weights, tokens).sum(-1)


def _norm(scores: jax.Array) -> jax.Array:
    centred = scores - scores.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + np.float32(1e-5))


HEADS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda scores: jax.nn.softmax(scores * SCALE),
    "softmax in a scan": lambda scores: lax.scan(
        lambda h, _: (jax.nn.softmax(h * SCALE), None), scores, None, length=1
    )[0],
    "attention": _attention,
    "log-softmax": lambda scores: jax.nn.log_softmax(scores * SCALE),
    "logsumexp": lambda scores: (
        scores * SCALE - jax.nn.logsumexp(scores * SCALE, axis=-1, keepdims=True)
    ),
    "layer norm": _norm,
    "RMS norm": lambda scores: (
        scores * lax.rsqrt((scores**2).mean(-1, keepdims=True) + np.float32(1e-5))
    ),
    "GELU": jax.nn.gelu,
    "softplus": lambda scores: jax.nn.softplus(scores * SCALE),
    "log(exp)": lambda scores: jnp.log(jnp.exp(scores)),
}


def main() -> None:
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(WIDTH, WIDTH)).astype(np.float32) * 0.5}
    images = random.normal(size=(64, WIDTH)).astype(np.float32)
    faults = jaxfi.exhaustive_faults(params, bits=range(23, 31))
    print(f"{len(faults) * len(images)} pairs; jax {jax.__version__}, {jax.default_backend()}")
    print("| head | DUE of plain jit | of a campaign | of operations | outcomes that differ |")
    print("|---|--:|--:|--:|--:|")
    for name, head in HEADS.items():

        def network(p: dict, x: jax.Array, head: Callable = head) -> jax.Array:
            return head(x @ p["w"])

        plain = jax.jit(network)
        faulty = (plain(jaxfi.inject(params, faults.fault(n)), images) for n in range(len(faults)))
        due = np.stack([~np.isfinite(outputs).all(-1) for outputs in map(np.asarray, faulty)])
        campaign = jaxfi.run_campaign(network, params, faults, images, np.zeros(64, int))
        audit = campaign.audit(due.size)
        counts = due.sum(), campaign.due.sum(), audit.audited_due.sum(), (~audit.agrees).sum()
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)


if __name__ == "__main__":
    main()
