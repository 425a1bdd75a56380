"""A plain Flax nnx loop: python examples/plain_nnx_loop.py

What most nnx training looks like: a module, an `nnx.Optimizer`, `nnx.jit`. The same loop with LoRA
is in existing_nnx_loop.py.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(16, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.outer = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.drop(nnx.relu(self.norm(self.inner(x)))))


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def batch(key, rows=128):
    """Points (rows, 16), and as labels which of ten fixed directions is the nearest."""
    x = jax.random.normal(key, (rows, 16))
    return x, jnp.argmax(x @ jax.random.normal(jax.random.key(99), (16, 10)), axis=-1)


def main(steps=300):
    key = jax.random.key(0)
    x, y = batch(key)
    model = Net(nnx.Rngs(0))  # or restored from a checkpoint
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        x, y = batch(jax.random.fold_in(key, step))
        loss = train_step(model, optimizer, x, y)
        losses.append(float(loss))
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss:.3f}")
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


if __name__ == "__main__":
    main(steps=5 if "--tiny" in sys.argv else 300)
