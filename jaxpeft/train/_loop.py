"""A loop around the train step: data, evaluation, checkpoints, metrics, progress."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import multihost_utils

from jaxpeft._argument_order import check_loss_order, check_order
from jaxpeft._errors import UserError
from jaxpeft.prompts._checks import check_loss
from jaxpeft.train._checkpoint import Checkpoints
from jaxpeft.train._loss_scale import scale_of
from jaxpeft.train._report import (
    MetricsFile,
    Progress,
    check_figure,
    check_progress,
    plot_loss,
)
from jaxpeft.train._step import LossFn, Metrics, State, check_dtypes, in_dtype, init, train_step


class Evaluation(NamedTuple):
    """The loss over a whole evaluation set."""

    loss: float  # mean per target token, in nats
    perplexity: float  # exp(loss)
    tokens: float  # sum of the weights: the number of target tokens


class FitResult(NamedTuple):
    """What `fit` returns."""

    state: State
    evaluation: Evaluation | None  # the last one of this process
    tokens_per_second: float | None  # target tokens, compilation not counted
    finished: bool  # False where SIGTERM stopped the run


def evaluate(
    loss_fn: LossFn,
    frozen: Any,
    adapter: Any,
    batches: Iterable[Any],
    *,
    put_batch: Callable[[Any], Any] | None = None,
) -> Evaluation:
    """The mean loss per target token over all batches: `sum(loss_sum) / sum(weight)`.

    Args:
      loss_fn: As in `train_step`, `(frozen, adapter, batch, key) -> (loss_sum, weight)`. Its
        key is `None`: no dropout. Give it jitted, and it is compiled once for many calls.
      frozen, adapter: From `split`.
      batches: The whole evaluation set, once. Batches of one shape compile once.
      put_batch: Puts a batch on its devices, see `fit`.
    Raises:
      UserError: where there is no target token at all.
      ValueError: where `frozen` and `adapter` are swapped, here or in `loss_fn`.
    """
    check_order("evaluate(loss_fn, frozen, adapter, batches)", adapter)
    check_loss_order(loss_fn)
    loss = weight = 0.0  # Python floats: summed in float64 whatever the device has
    for batch in batches:
        batch = batch if put_batch is None else put_batch(batch)
        loss_sum, tokens = loss_fn(frozen, adapter, batch, None)
        loss += float(loss_sum)
        weight += float(tokens)
    if weight == 0:
        raise UserError(
            "the evaluation set has no target tokens, so its loss is not defined. Give at least "
            "one batch in which a target has a weight above 0."
        )
    mean = loss / weight
    # exp overflows above 709; the perplexity of such a loss is infinite.
    return Evaluation(mean, math.exp(mean) if mean < 709 else math.inf, weight)


def fit(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    frozen: Any,
    adapter: Any,
    data: Iterable[Any],
    *,
    max_steps: int | None = None,
    key: jax.Array | None = None,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    compute_dtype: Any = None,
    on_nan: str = "stop",
    eval_data: Iterable[Any] | None = None,
    eval_every: int | None = None,
    output_dir: str | Path | None = None,
    save_every: int | None = None,
    max_to_keep: int | None = 3,
    log_every: int = 1,
    put_batch: Callable[[Any], Any] | None = None,
    progress: bool | str | None = None,
    loss_figure: str | Path | None = None,
) -> FitResult:
    """Trains the adapter, and resumes the run in `output_dir` where there is one.

    Started again with the same arguments after any end (SIGKILL too), it restores the newest
    checkpoint, sets the data iterator to its position, cuts the metrics file back to it, and
    ends with the same bytes as a run that was never stopped. On SIGTERM, with which preemptible
    machines announce their end, it saves a checkpoint and returns.

    Args:
      loss_fn, tx, gradient_accumulation_steps, max_grad_norm, compute_dtype, on_nan: As in
        `train_step`.
      frozen: From `split`. It is passed to `loss_fn`, never donated, never copied.
      adapter: From `split`, {path: array}: the initial values. It is copied, never donated.
      data: Iterable of batches. With an `output_dir` its iterator has `get_state` and
        `set_state` (as all iterators of grain have), with a state of JSON values.
      max_steps: Steps in all, those of earlier processes included. `None`: until the data
        iterator is exhausted.
      key: For dropout, the same in all processes of a run. `None`: no dropout.
      eval_data: Batches to evaluate on, iterated anew each time: before the first step, every
        `eval_every` steps, and at the end.
      eval_every: Steps between evaluations. `None`: only at both ends.
      output_dir: Folder of the checkpoints and of `metrics.jsonl`. `None`: nothing is written.
      save_every: Steps between checkpoints; one is always written at the start and at the end.
      max_to_keep: How many checkpoints are kept, the newest ones. `None`: all.
      log_every: Steps between records of the training loss.
      put_batch: Puts a batch of numpy arrays on its devices, on a mesh for example
        `lambda batch: jax.device_put(batch, NamedSharding(mesh, P("data")))`. Put `frozen` and
        the adapter on that mesh, too.
      progress: `None`: a progress bar where stderr is a terminal, `True`: always, `False`: never;
        "lines": a line on stdout after each evaluation, for output that goes to a file.
      loss_figure: File to draw the loss to at the end; needs an `output_dir`.
    Returns:
      The final state, the last evaluation, the throughput, and whether the run has finished.
    Raises:
      UserError: for a loss or an update that is not finite (with `on_nan="stop"`, naming the
        step), for a checkpoint that cannot be written or belongs to another run; before the first
        step for a figure or progress bar whose package is not installed.
      ValueError: for options that do not fit together, and for `frozen` and `adapter` swapped;
        before the first step, for a loss with virtual tokens that reads the placeholders of a
        prefix, or that puts virtual tokens in front of the first example of a packed row alone
        (see `jp.prompts.check_prefix`).
    """
    _check_arguments(loss_fn, adapter)
    _check_options(eval_data, eval_every, output_dir, save_every, log_every, loss_figure)
    check_progress(progress)
    batches: Any = iter(data)
    if output_dir is not None and not hasattr(batches, "set_state"):
        raise ValueError(
            f"checkpoints need data whose iterator has get_state and set_state, as those of grain "
            f"have; got {type(batches).__name__}. Use such data, or no `output_dir`."
        )
    step = train_step(
        loss_fn,
        tx,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        compute_dtype=compute_dtype,
        on_nan=on_nan,
    )
    state = init(adapter, tx)
    # Before the first evaluation, which may take long.
    check_dtypes(frozen, state.adapter, compute_dtype, scale_of(state.opt_state) is not None)

    with contextlib.ExitStack() as stack:
        checkpoints = metrics_file = None
        position = _Position()
        if output_dir is not None:
            checkpoints = stack.enter_context(Checkpoints(output_dir, max_to_keep))
            state, position = _restore(checkpoints, state, batches)
            if jax.process_index() == 0:
                metrics_file = MetricsFile(Path(output_dir) / "metrics.jsonl", position.saved_at)
                stack.callback(metrics_file.close)
            if loss_figure is not None and metrics_file:
                check_figure(loss_figure)  # now, not when the run has ended
        shown = Progress(position.step, max_steps, progress)
        stack.callback(shown.close)
        loop = _Loop(
            step=jax.jit(step, donate_argnums=0),
            eval_loss=jax.jit(in_dtype(loss_fn, compute_dtype)),
            check_first=_first_batch_check(loss_fn, gradient_accumulation_steps, key),
            frozen=frozen,
            key=key,
            state=state,
            position=position,
            batches=batches,
            eval_data=eval_data,
            put_batch=put_batch or (lambda batch: batch),
            max_steps=max_steps,
            eval_every=eval_every,
            save_every=save_every,
            checkpoints=checkpoints,
            log=_Log(metrics_file, shown, log_every, stop_at_nonfinite=on_nan == "stop"),
        )
        finished = loop.run(stack.enter_context(_Termination()))
        if loss_figure is not None and finished and metrics_file:
            plot_loss(metrics_file.path, loss_figure)
    return FitResult(loop.state, loop.evaluation, shown.rate, finished)


def _check_arguments(loss_fn: LossFn, adapter: Any) -> None:
    check_order("fit(loss_fn, tx, frozen, adapter, data)", adapter)
    check_loss_order(loss_fn)
    if not jax.tree.leaves(adapter):
        raise ValueError(
            f"the adapter is {adapter!r}: it has no arrays, so there is nothing to train. The "
            f"order of arguments is `fit(loss_fn, tx, frozen, adapter, data)`."
        )


def _check_options(eval_data, eval_every, output_dir, save_every, log_every, loss_figure) -> None:
    intervals = {"eval_every": eval_every, "save_every": save_every, "log_every": log_every}
    for name, every in intervals.items():
        if every is not None and every < 1:
            raise ValueError(f"`{name}` is a number of steps, at least 1; got {every}.")
    if eval_every is not None and eval_data is None:
        raise ValueError(
            f"`eval_every={eval_every}` needs `eval_data`, the batches to evaluate on."
        )
    for name, option in [("save_every", save_every), ("loss_figure", loss_figure)]:
        if option is not None and output_dir is None:
            raise ValueError(f"`{name}={option!r}` needs `output_dir`, the folder to write to.")


class _Position(NamedTuple):
    """How far a run has come."""

    step: int = 0  # steps taken
    saved_at: int | None = None  # the step of the newest checkpoint
    evaluated_at: int | None = None  # the step of the newest evaluation


def _restore(checkpoints: Checkpoints, state: State, batches: Any) -> tuple[State, _Position]:
    """The state and position of the newest checkpoint, to which the data iterator is set.

    Without a checkpoint: the given state, at the start.
    """
    if not checkpoints.steps():
        return state, _Position()
    state, run = checkpoints.restore(state)
    batches.set_state(run["data"])
    step = int(state.step)
    return state, _Position(step, saved_at=step, evaluated_at=run["evaluated_at"])


def _first_batch_check(loss_fn: LossFn, microbatches: int, key: Any) -> Callable:
    """`check(frozen, adapter, batch)`: runs `check_loss` on the rows of one microbatch."""

    def check(frozen, adapter, batch):
        if microbatches > 1:
            batch = jax.tree.map(lambda x: x[::microbatches], batch)
        check_loss(loss_fn, frozen, adapter, batch, key)

    return check


class _Log:
    """Metrics file and progress bar, fed with the metrics of each step.

    Reading metrics waits for the device. So those of a step are read when the next step has been
    dispatched, and the device always has work.

    Args:
      file: Where records go, `None` for nowhere.
      progress: What the user sees.
      every: Steps between records of the training loss.
      stop_at_nonfinite: Whether a step that is not finite is an error.
    """

    def __init__(
        self, file: MetricsFile | None, progress: Progress, every: int, stop_at_nonfinite: bool
    ):
        self._file = file
        self._progress = progress
        self._every = every
        self._stop_at_nonfinite = stop_at_nonfinite
        self._pending: tuple[int, Metrics] | None = None

    def step(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step just dispatched, and handles those of the step before."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Reads the pending metrics from the device, checks them, records and shows them."""
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        metrics = jax.device_get(on_device)
        loss, norm, tokens = (float(x) for x in metrics[:3])
        if metrics.nonfinite and self._stop_at_nonfinite:
            raise _nonfinite_error(step, loss, norm)
        skipped = bool(metrics.nonfinite) or bool(metrics.overflow)
        if self._file and (skipped or step % self._every == 0):
            flag = {"skipped": True} if skipped else {}
            self._file.write(step=step, loss=loss, grad_norm=norm, tokens=tokens, **flag)
        self._progress.advance(step, loss, tokens)

    def evaluation(self, step: int, evaluation: Evaluation, record: bool) -> None:
        """Shows an evaluation, and records it where the file does not have it yet."""
        if self._file and record:
            loss, perplexity, _ = evaluation
            self._file.write(step=step, eval_loss=loss, eval_perplexity=perplexity)
        self._progress.note("eval loss", f"eval loss {evaluation.loss:.4f}")

    def sync(self) -> None:
        """Returns when all records are on disk."""
        self.flush()
        if self._file:
            self._file.sync()


def _nonfinite_error(step: int, loss: float, norm: float) -> UserError:
    what = f"not finite at step {step} (loss {loss}, gradient norm {norm})"
    if math.isfinite(loss) and math.isfinite(norm):
        return UserError(
            f"the optimizer's update is {what}. The step was not taken. Keep the adapter and the "
            f"optimizer's state in float32; if they are, look at the optimizer's own options and "
            f"its schedule."
        )
    return UserError(
        f"the loss or its gradient is {what}. The step was not taken. Lower the learning rate, "
        f'set `max_grad_norm`, look at the data of that step, or pass on_nan="skip".'
    )


@dataclasses.dataclass
class _Loop:
    """Steps, evaluations and checkpoints in their order; `state` and `position` move along."""

    step: Callable  # the jitted train step
    eval_loss: LossFn  # jitted
    check_first: Callable | None  # of the first batch; `None` once it is checked
    frozen: Any
    key: jax.Array | None
    state: State
    position: _Position
    batches: Iterator[Any]
    eval_data: Iterable[Any] | None
    put_batch: Callable[[Any], Any]
    max_steps: int | None
    eval_every: int | None
    save_every: int | None
    checkpoints: Checkpoints | None
    log: _Log
    evaluation: Evaluation | None = None

    def run(self, stopping: "_Termination") -> bool:
        """Trains to the end, and returns True; saves and returns False where it is to stop."""
        while not stopping(self.position.step):
            last = self.max_steps is not None and self.position.step >= self.max_steps
            self._evaluate_if_due(last)
            self._save_if_due(last)
            if last:
                return True
            batch = next(self.batches, None)
            if batch is None:  # the iterator is exhausted: the step before was the last
                self.max_steps = self.position.step
            else:
                self._take_step(self.put_batch(batch))
        self._save()
        return False

    def _take_step(self, batch: Any) -> None:
        if self.check_first is not None:
            self.check_first(self.frozen, self.state.adapter, batch)
            self.check_first = None
        self.state, metrics = self.step(self.state, self.frozen, batch, self.key)
        self.position = self.position._replace(step=self.position.step + 1)
        self.log.step(self.position.step, metrics)

    def _evaluate_if_due(self, last: bool) -> None:
        if self.eval_data is None:
            return
        step, _, evaluated_at = self.position
        due = last or step == 0 or (self.eval_every and step % self.eval_every == 0)
        # A resumed run that has nothing left to do still reports its final loss.
        if (due and evaluated_at != step) or (last and self.evaluation is None):
            self._evaluate(self.eval_data)

    def _evaluate(self, eval_data: Iterable[Any]) -> None:
        step, _, evaluated_at = self.position
        self.log.flush()
        self.evaluation = evaluate(
            self.eval_loss, self.frozen, self.state.adapter, eval_data, put_batch=self.put_batch
        )
        self.log.evaluation(step, self.evaluation, record=evaluated_at != step)
        self.position = self.position._replace(evaluated_at=step)

    def _save_if_due(self, last: bool) -> None:
        # At step 0 too: a folder that cannot be written to is known before the first step.
        if last or (self.save_every and self.position.step % self.save_every == 0):
            self._save()

    def _save(self) -> None:
        self.log.flush()
        step, saved_at, evaluated_at = self.position
        if self.checkpoints is None or saved_at == step:
            return
        self.log.sync()
        data: Any = self.batches
        run = {"data": data.get_state(), "evaluated_at": evaluated_at}
        self.checkpoints.save(self.state, run)
        self.position = self.position._replace(saved_at=step)


class _Termination:
    """Whether the process has been asked to stop, by SIGTERM."""

    def __init__(self):
        self._requested = False

    def __enter__(self):
        # Only the main thread may set handlers. With several processes, JAX has its own.
        self._ours = (
            threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        )
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *signal_and_frame):
        self._requested = True

    def __exit__(self, *exception):
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)

    def __call__(self, step):
        if jax.process_count() > 1:
            # All processes stop at one step, or they would wait for each other.
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested
