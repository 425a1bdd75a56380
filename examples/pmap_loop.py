"""LoRA under `jax.pmap`, for loops that have one: python examples/pmap_loop.py

Every device holds base and adapter and takes its rows of the batch; `axis_name` is where gradients
are summed. The mean is over all target tokens, so devices may have different numbers of them. To
see it with 8 devices on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8.

New code does better with a mesh (tpu_lora.py), where the base can be sharded as well.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from jaxpeft.models import decoder
from jaxpeft.train import cross_entropy, init, train_step

CONFIG = decoder.Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)


def batch(rng, devices, rows=8, length=32):
    """(devices, rows, length): each token is three times the last one plus one, modulo 64."""
    tokens = [rng.integers(0, CONFIG.vocab_size, (devices, rows))]
    for _ in range(length):
        tokens.append((3 * tokens[-1] + 1) % CONFIG.vocab_size)
    tokens = np.stack(tokens, axis=-1).astype(np.int32)
    weights = rng.integers(0, 2, tokens[..., 1:].shape).astype(np.float32)
    return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "weights": weights}


def main(steps=60, devices=None):
    devices = devices or jax.local_device_count()
    key = jax.random.key(0)

    # The base: decoder.load("FOLDER") in earnest.
    params = decoder.init(CONFIG, key)
    forward = decoder.apply_fn(CONFIG)

    # The adapter.
    sites = jp.sites(forward, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jp.lora(8, sites.matrices, alpha=16)  # the table too, which is the head as well
    frozen, adapter = jp.split(method(key, params))
    model = jp.lift(forward, materialize="error")

    def loss_fn(frozen, adapter, batch, key):
        logits = model(jp.combine(frozen, adapter), batch["tokens"])
        return cross_entropy(logits, batch["targets"], batch["weights"])

    # The step. State and base are given once and held by every device.
    tx = optax.adamw(1e-2)
    step = jax.pmap(
        train_step(loss_fn, tx, max_grad_norm=1.0, axis_name="data"),
        axis_name="data",
        in_axes=(None, None, 0, None),
        out_axes=None,
    )
    state, rng, losses = init(adapter, tx), np.random.default_rng(0), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch(rng, devices), key)
        losses.append(float(metrics.loss))
        if len(losses) % 10 == 1:
            print(f"step {int(state.step):4d}  loss {metrics.loss:.3f}  on {devices} devices")
    return losses, state.adapter


if __name__ == "__main__":
    main(steps=5 if "--tiny" in sys.argv else 60)
