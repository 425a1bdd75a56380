"""Training: a pure step for any loop, and a loop for those who have none.

tx = optax.adamw(1e-4)
step = jax.jit(train.train_step(loss_fn, tx, clip=1.0), donate_argnums=0)
state = train.init(adapter, tx)
for batch in batches:
    state, metrics = step(state, frozen, batch, key)
"""

from jaxpeft.train.loss import cross_entropy, next_token
from jaxpeft.train.step import LossFn, Metrics, State, init, train_step

__all__ = [
    "LossFn",
    "Metrics",
    "State",
    "cross_entropy",
    "init",
    "next_token",
    "train_step",
]
