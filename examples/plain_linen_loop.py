"""A plain Flax linen loop: python examples/plain_linen_loop.py

What most linen training looks like: a `TrainState`, batch statistics, dropout. The same loop with
LoRA is in existing_linen_loop.py.
"""

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.Dense(64)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


@jax.jit
def train_step(state, x, y, key):
    def loss_fn(params):
        logits, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, changed["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def batch(key, rows=128):
    """Points (rows, 16), and as labels which of ten fixed directions is the nearest."""
    x = jax.random.normal(key, (rows, 16))
    return x, jnp.argmax(x @ jax.random.normal(jax.random.key(99), (16, 10)), axis=-1)


def main(steps=300):
    key = jax.random.key(0)
    x, y = batch(key)
    model = Net()
    variables = model.init(key, x)  # or those of a checkpoint
    params, stats = variables["params"], variables["batch_stats"]
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        batch_stats=stats,
        tx=optax.adamw(1e-2),
    )
    losses = []
    for step in range(steps):
        x, y = batch(jax.random.fold_in(key, step))
        state, loss = train_step(state, x, y, jax.random.fold_in(key, step))
        losses.append(float(loss))
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss:.3f}")
    return losses, state.params


if __name__ == "__main__":
    main(steps=5 if "--tiny" in sys.argv else 300)
