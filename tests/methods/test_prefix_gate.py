"""A prefix is a gate between attention to the input and attention to the prefix.

He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021, equation 7:

    head(x) = (1 - λ(x)) softmax(q K^T) V + λ(x) softmax(q P_k^T) P_v,    q = x W_q,
    λ(x) = sum_i exp(q P_k^T)_i / (sum_i exp(q P_k^T)_i + sum_j exp(q K^T)_j)

written out in NumPy, one query at a time, with the factor 1 / sqrt(d) which the paper leaves out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from .toy import normal

B, T, D, H, SIZE, LENGTH, V = 2, 5, 12, 3, 4, 7, 11


def params():
    made = {
        name: {"kernel": normal(i, D, H * SIZE) * 3, "bias": normal(i + 10, H * SIZE)}
        for i, name in enumerate("qkv")
    }
    return made | {"embed": normal(20, V, D) * 3, "o": {"kernel": normal(21, H * SIZE, D)}}


def project(x, p):
    return (x @ p["kernel"] + p["bias"]).reshape(*x.shape[:-1], H, SIZE)


def attention(p, ids, causal):
    """One layer, which knows nothing of prefixes."""
    x = p["embed"][ids]
    q, k, v = (project(x, p[name]) for name in "qkv")
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / SIZE**0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    return y.reshape(*ids.shape, H * SIZE) @ p["o"]["kernel"]


def over(q, keys, values):
    """softmax(q K^T / sqrt(d)) V of one query, and the sum of the exponentials."""
    weights = np.exp(keys @ q / SIZE**0.5)
    return weights @ values / weights.sum(), weights.sum()


@pytest.mark.parametrize("causal", [False, True])
def test_a_prefix_is_a_gate_between_attention_to_the_input_and_to_the_prefix(causal):
    p, ids = params(), jax.random.randint(jax.random.key(30), (B, T), 0, V)

    def model(p, ids):
        return attention(p, ids, causal)

    sites = jp.sites(model, p, ids)
    method = jp.prefix_tuning(
        LENGTH, sites.match("k/kernel"), sites.match("v/kernel"), dtype=jnp.float64
    )
    frozen, adapter = jp.split(method(jax.random.key(0), p))
    adapter = {name: normal(40 + i, *adapter[name].shape) * 3 for i, name in enumerate(adapter)}
    tokens, virtual_positions = jp.prompts.prepend_virtual_tokens(ids, LENGTH)
    out = jp.lift(model)(jp.combine(frozen, adapter, virtual_positions=virtual_positions), tokens)
    out = jp.prompts.drop_virtual_positions(out, LENGTH)

    x = np.asarray(p["embed"])[ids]
    q, k, v = (np.asarray(project(x, p[name])) for name in "qkv")
    rows = {
        name: np.asarray(adapter[f"{name}/kernel/rows"]).reshape(LENGTH, H, SIZE) for name in "kv"
    }
    heads, gates = np.zeros((B, T, H, SIZE)), np.zeros((B, T, H))
    for b, t, h in np.ndindex(B, T, H):
        seen = slice(t + 1 if causal else T)
        attended, of_input = over(q[b, t, h], k[b, seen, h], v[b, seen, h])
        modified, of_prefix = over(q[b, t, h], rows["k"][:, h], rows["v"][:, h])
        gates[b, t, h] = gate = of_prefix / (of_prefix + of_input)
        heads[b, t, h] = (1 - gate) * attended + gate * modified
    want = heads.reshape(B, T, -1) @ np.asarray(p["o"]["kernel"])
    np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)
    # The gate is open here and shut there, so that both terms are seen.
    assert gates.min() < 0.2 and gates.max() > 0.8
