"""The memory report, from shapes alone, against arrays that really exist."""

import jax
import jax.numpy as jnp
import optax

import jaxpeft as jp

L, D, B = 4, 32, 8


def model(p, x):
    for w in p["layers"]:
        x = jnp.tanh(x @ w)
    return x


def remat(p, x):
    for w in p["layers"]:
        x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w)
    return x


def report(fn, rank=2):
    p = {"layers": [jax.ShapeDtypeStruct((D, D), jnp.float32)] * L}
    x = jax.ShapeDtypeStruct((B, D), jnp.float32)
    sites = jp.sites(fn, p, x)
    method = jp.lora(rank, sites.linear)
    frozen, adapter = jp.split(jax.eval_shape(method, jax.random.key(0), p))

    def loss(adapter, frozen, x):
        return jnp.sum(jp.lift(fn)(jp.combine(frozen, adapter), x))

    return jp.estimate_memory(loss, adapter, frozen, x, tx=optax.adam(1e-3)), adapter


def test_weights_gradients_and_optimizer_are_the_bytes_of_their_arrays():
    memory, adapter = report(model)
    trained = sum(x.size * 4 for x in adapter.values())
    assert trained == L * 2 * 2 * D * 4
    assert memory.weights == L * D * D * 4 + trained
    assert memory.gradients == trained
    assert memory.optimizer == 2 * trained + 4  # two moments and a counter
    assert memory.total == memory.weights + 3 * trained + 4 + memory.activations


def test_activations_are_what_the_backward_pass_keeps_beside_its_arguments():
    kept, again = report(model)[0].activations, report(remat)[0].activations
    one = B * D * 4
    # At least the tanh of every layer; at most some copies of it and the rank-sized products.
    assert L * one <= kept <= 4 * L * one
    assert again < kept
    assert report(model, rank=8)[0].activations > kept


def test_the_report_prints_its_rows():
    text = str(jp.MemoryEstimate(2**20, 2**21, 0, 2**19))
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["weights", "1.00"],
        ["gradients", "2.00"],
        ["optimizer", "0.00"],
        ["activations", "0.50"],
        ["total", "3.50"],
    ]
