"""Training: a pure step for any loop, and a loop for those who have none.

tx = optax.adamw(1e-4)
step = jax.jit(train.train_step(loss_fn, tx, max_grad_norm=1.0), donate_argnums=0)
state = train.init(adapter, tx)
for batch in batches:
    state, metrics = step(state, frozen, batch, key)
"""

from jaxpeft.train import heads
from jaxpeft.train.adam8bit import adamw8bit, scale_by_adam8bit
from jaxpeft.train.checkpoint import Checkpoints
from jaxpeft.train.data import Batches, Chat, Completion, Examples, Text, read_examples
from jaxpeft.train.errors import UserError, one_line_errors
from jaxpeft.train.loop import Evaluation, FitResult, evaluate, fit
from jaxpeft.train.lora_plus import lora_plus
from jaxpeft.train.loss import cross_entropy, next_token
from jaxpeft.train.loss_scale import LossScaleState, loss_scaled
from jaxpeft.train.paging import paged, to_host
from jaxpeft.train.pruning import masked_entries, pruned, rigl
from jaxpeft.train.rank_budget import rank_budget
from jaxpeft.train.report import plot_loss, read_metrics
from jaxpeft.train.step import LossFn, Metrics, State, fill_float0, init, train_step
from jaxpeft.train.text import TextTokenizer, Tokens

__all__ = [
    "Batches",
    "Chat",
    "Checkpoints",
    "Completion",
    "Evaluation",
    "Examples",
    "FitResult",
    "LossFn",
    "LossScaleState",
    "Metrics",
    "State",
    "Text",
    "TextTokenizer",
    "Tokens",
    "UserError",
    "adamw8bit",
    "cross_entropy",
    "evaluate",
    "fill_float0",
    "fit",
    "heads",
    "init",
    "lora_plus",
    "loss_scaled",
    "masked_entries",
    "next_token",
    "one_line_errors",
    "paged",
    "plot_loss",
    "pruned",
    "rank_budget",
    "read_examples",
    "read_metrics",
    "rigl",
    "scale_by_adam8bit",
    "to_host",
    "train_step",
]
