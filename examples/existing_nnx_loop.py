"""A Flax nnx loop, with LoRA: python examples/existing_nnx_loop.py

    diff examples/plain_nnx_loop.py examples/existing_nnx_loop.py

shows the ten lines. The only `nnx.Param`s left are those of the adapter, so that is what the
optimizer sees; batch statistics and random counters live on in `model.rest`. At the end,
`to_module(jp.merge(tree), rest)` is a plain module again.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpeft as jp
from jaxpeft.bridge import from_nnx


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
        tree = jp.combine(model.frozen.get_value(), nnx.to_pure_dict(nnx.state(model.adapter)))
        logits, rest = model.forward(tree, model.rest.get_value(), x)
        model.rest.set_value(rest)
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
    fn, params, rest, to_module = from_nnx(model)
    frozen, adapter = jp.split(jp.lora(4, jp.sites(fn, params, rest, x).linear)(key, params))
    model = nnx.Dict(frozen=nnx.Variable(frozen), rest=nnx.Variable(rest), forward=jp.lift(fn))
    model.adapter = nnx.Dict({path: nnx.Param(array) for path, array in adapter.items()})
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
