"""Training: a pure step for any loop, and a loop for those who have none.

tx = optax.adamw(1e-4)
step = jax.jit(train.train_step(loss_fn, tx, clip=1.0), donate_argnums=0)
state = train.init(adapter, tx)
for batch in batches:
    state, metrics = step(state, frozen, batch, key)
"""

from jaxpeft._errors import UserError, one_line_errors
from jaxpeft._losses import cross_entropy, next_token
from jaxpeft.train._checkpoint import Checkpoints
from jaxpeft.train._loop import Evaluation, Run, evaluate, fit
from jaxpeft.train._loss_scale import LossScaleState, loss_scaled
from jaxpeft.train._report import loss_figure, read_metrics
from jaxpeft.train._step import LossFn, Metrics, State, fill_float0, init, train_step

__all__ = [
    "Checkpoints",
    "Evaluation",
    "LossFn",
    "LossScaleState",
    "Metrics",
    "Run",
    "State",
    "UserError",
    "cross_entropy",
    "evaluate",
    "fill_float0",
    "fit",
    "init",
    "loss_figure",
    "loss_scaled",
    "next_token",
    "one_line_errors",
    "read_metrics",
    "train_step",
]
