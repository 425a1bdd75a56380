"""A loop around the train step: data, evaluation, checkpoints, metrics, progress."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import multihost_utils

from jaxpeft._errors import UserError
from jaxpeft.prompts._checks import check_loss
from jaxpeft.train._checkpoint import Checkpoints
from jaxpeft.train._loss_scale import scale_of
from jaxpeft.train._report import MetricsFile, Progress, check_figure, check_progress, loss_figure
from jaxpeft.train._step import LossFn, State, check_dtypes, in_dtype, init, train_step


class Evaluation(NamedTuple):
    """The loss over a whole held-out set."""

    loss: float  # mean per target token, in nats
    perplexity: float  # exp(loss)
    tokens: float  # target tokens


class Run(NamedTuple):
    """What `fit` returns."""

    state: State
    held_out: Evaluation | None  # at the last step that was evaluated in this process
    tokens_per_second: float | None  # target tokens, without compilation
    finished: bool  # False where SIGTERM stopped it


def evaluate(
    loss_fn: LossFn,
    adapter: Any,
    frozen: Any,
    batches: Iterable[Any],
    *,
    place: Callable[[Any], Any] | None = None,
) -> Evaluation:
    """The token-weighted loss over all batches: sums of losses over sums of weights.

    Args:
      loss_fn: As in `train_step`, `(adapter, frozen, batch, key) -> (loss_sum, weight)`. Its
        key is `None`: no dropout. Pass it jitted to compile it once over many calls.
      adapter: From `split`.
      frozen: From `split`.
      batches: The whole held-out set, once. Batches of one shape compile once.
      place: Puts a batch on its devices, see `fit`.
    Raises:
      UserError: where there is no target token at all.
    """
    loss = weight = 0.0  # Python floats: summed in float64 whatever the device has
    place = place or (lambda batch: batch)
    for batch in batches:
        loss_sum, tokens = loss_fn(adapter, frozen, place(batch), None)
        loss += float(loss_sum)
        weight += float(tokens)
    if weight == 0:
        raise UserError("the held-out set has no target tokens, so it has no loss.")
    mean = loss / weight
    # exp overflows above 709; a loss like that is a perplexity of infinity
    return Evaluation(mean, math.exp(mean) if mean < 709 else math.inf, weight)


def fit(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    adapter: Any,
    frozen: Any,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    key: jax.Array | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    compute_dtype: Any = None,
    on_nan: str = "stop",
    held_out: Iterable[Any] | None = None,
    eval_every: int | None = None,
    folder: str | Path | None = None,
    save_every: int | None = None,
    keep: int | None = 3,
    log_every: int = 1,
    place: Callable[[Any], Any] | None = None,
    progress: bool | str | None = None,
    figure: str | Path | None = None,
) -> Run:
    """Trains the adapter, and goes on where a killed run of the same folder has stopped.

    Started again with the same arguments after any end (SIGKILL too), it restores the newest
    checkpoint, sets the data to its position, cuts the metrics file back to it, and ends
    with the same bytes as a run that was never stopped. SIGTERM, with which preemptible
    machines announce their end, saves a checkpoint and returns.

    Args:
      loss_fn, tx, accumulate, clip, compute_dtype, on_nan: As in `train_step`.
      adapter: What is trained, {path: array}; stays as it is.
      frozen: Passed to `loss_fn`, never donated, never copied.
      data: Iterable of batches. With a `folder` its iterator has `get_state` and
        `set_state` (all of grain's have), with a state that JSON can hold.
      steps: Steps in all, those of earlier processes included. `None`: until the data ends.
      key: For dropout, the same in all processes of a run. `None`: no dropout.
      held_out: Batches to evaluate on, iterated anew each time: before the first step, every
        `eval_every` steps and at the end.
      eval_every: Steps between evaluations. `None`: only at both ends.
      folder: Where checkpoints and `metrics.jsonl` go. `None` writes nothing.
      save_every: Steps between checkpoints; one is always written at the end.
      keep: Checkpoints to keep, the newest; `None` for all.
      log_every: Steps between records of the training loss.
      place: Puts a batch of numpy arrays on its devices, on a mesh for example
        `lambda batch: jax.device_put(batch, NamedSharding(mesh, P("data")))`. Put the
        adapter and `frozen` on that mesh, too.
      progress: `None` shows it on a terminal, `True` always, `False` never; "lines" prints a
        line to stdout after each evaluation, for output that goes to a file.
      figure: Where to draw the loss at the end; needs a folder.
    Raises:
      UserError: for a loss or an update that is not finite (with `on_nan="stop"`, naming the
        step), for a checkpoint that cannot be written or belongs to another run; before the first
        step for a figure or progress that needs what is not installed.
      ValueError: for options that do not fit together; before the first step, for a loss with
        virtual tokens that reads the placeholders of a prefix, or that puts virtual tokens in front
        of the first example of a packed row alone (`jp.prompts.check_prefix` says more).
    """
    for name, every in [("eval_every", eval_every), ("save_every", save_every)]:
        if every is not None and every < 1:
            raise ValueError(f"`{name}` is a number of steps, at least 1; got {every}.")
    if log_every < 1:
        raise ValueError(f"`log_every` is a number of steps, at least 1; got {log_every}.")
    if eval_every is not None and held_out is None:
        raise ValueError(f"`eval_every={eval_every}` needs `held_out`, the batches to evaluate on.")
    for name, option in [("save_every", save_every), ("figure", figure)]:
        if option is not None and folder is None:
            raise ValueError(f"`{name}={option!r}` needs `folder`, the place to write to.")
    check_progress(progress)

    place = place or (lambda batch: batch)
    batches: Any = iter(data)
    if folder is not None and not hasattr(batches, "set_state"):
        raise ValueError(
            f"checkpoints need data whose iterator has get_state and set_state, as grain's have; "
            f"got {type(batches).__name__}. Use such data, or no `folder`."
        )
    step = jax.jit(
        train_step(
            loss_fn,
            tx,
            accumulate=accumulate,
            clip=clip,
            compute_dtype=compute_dtype,
            on_nan=on_nan,
        ),
        donate_argnums=0,
    )
    eval_loss = jax.jit(in_dtype(loss_fn, compute_dtype))
    state = init(adapter, tx)
    # Before the first evaluation, which may take long.
    check_dtypes(state.adapter, frozen, compute_dtype, scale_of(state.opt_state) is not None)
    evaluation = None
    last, unchecked = False, True

    with contextlib.ExitStack() as stack:
        checkpoints = metrics = None
        number, saved_at, evaluated_at, unread = 0, None, None, None
        if folder is not None:
            checkpoints = stack.enter_context(Checkpoints(folder, keep))
            if checkpoints.steps():
                state, run = checkpoints.restore(state)
                batches.set_state(run["data"])
                number = saved_at = int(state.step)
                evaluated_at = run["evaluated_at"]
            if jax.process_index() == 0:
                metrics = MetricsFile(Path(folder) / "metrics.jsonl", saved_at)
                stack.callback(metrics.close)
            if figure is not None and metrics:
                check_figure(figure)  # now, not when the run has ended
        shown = Progress(number, steps, progress)
        stack.callback(shown.close)
        stopping = stack.enter_context(_Termination())

        def settle():
            """Reads the metrics of the last step from the device, and deals with them."""
            nonlocal unread
            if unread is None:
                return
            step_number, on_device = unread
            unread = None
            measured = jax.device_get(on_device)
            loss, norm, tokens = (float(x) for x in measured[:3])
            bad = bool(measured.nonfinite)
            if bad and on_nan == "stop":
                told = f"not finite at step {step_number} (loss {loss}, gradient norm {norm})"
                if math.isfinite(loss) and math.isfinite(norm):
                    raise UserError(
                        f"the optimizer's update is {told}. It was not made. Adapters and "
                        f"optimizer states are best kept in float32; else look at the optimizer's "
                        f"own options and its schedule."
                    )
                raise UserError(
                    f"the loss is {told}. The step was not taken. Lower the learning rate, clip "
                    f'the gradient, look at the data of that step, or pass on_nan="skip".'
                )
            bad |= bool(measured.overflow)
            if metrics and (bad or step_number % log_every == 0):
                skipped = {"skipped": True} if bad else {}
                metrics.write(step=step_number, loss=loss, grad_norm=norm, tokens=tokens, **skipped)
            shown.advance(step_number, loss, tokens)

        def measure(held_out):
            nonlocal evaluation, evaluated_at
            settle()
            evaluation = evaluate(eval_loss, state.adapter, frozen, held_out, place=place)
            if metrics and evaluated_at != number:
                loss, perplexity, _ = evaluation
                metrics.write(step=number, held_out_loss=loss, perplexity=perplexity)
            evaluated_at = number
            shown.note("held out", f"held out {evaluation.loss:.4f}")

        def save():
            nonlocal saved_at
            settle()
            if checkpoints is None or saved_at == number:
                return
            if metrics:
                metrics.sync()
            checkpoints.save(state, {"data": batches.get_state(), "evaluated_at": evaluated_at})
            saved_at = number

        while not stopping(number):
            last = steps is not None and number >= steps
            due = number == 0 or (eval_every and number % eval_every == 0)
            if held_out is not None:
                # A resumed run that has nothing left to do still tells where it ended.
                if (last and evaluation is None) or ((last or due) and evaluated_at != number):
                    measure(held_out)
            # At step 0 too: a place that cannot be written to is known before the first step.
            if last or (save_every and number % save_every == 0):
                save()
            if last:
                break
            batch = next(batches, None)
            if batch is None:
                steps = number  # the data has ended: this was the last step
                continue
            batch = place(batch)
            if unchecked:
                some = jax.tree.map(lambda x: x[::accumulate], batch) if accumulate > 1 else batch
                check_loss(loss_fn, state.adapter, frozen, some, key)
                unchecked = False
            state, measured = step(state, frozen, batch, key)
            number += 1
            # Metrics are read when the next step is under way: the device never waits for us.
            settle()
            unread = number, measured
        else:
            save()
        finished = not stopping.requested or last
        if figure is not None and finished and metrics:
            loss_figure(metrics.path, figure)
    return Run(state, evaluation, shown.rate, finished)


class _Termination:
    """Whether the process has been asked to end, by SIGTERM."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        # Only the main thread may set handlers. With several processes, JAX has its own.
        self._ours = (
            threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        )
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *signal_and_frame):
        self.requested = True

    def __exit__(self, *exception):
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)

    def __call__(self, step):
        if jax.process_count() > 1:
            # All processes stop at one step, or they would wait for each other.
            self.requested = multihost_utils.reached_preemption_sync_point(step)
        return self.requested
