"""The train step: a pure function of (state, frozen, batch, key), for any loop and any mesh.

Only the adapter is differentiated, clipped and updated. The frozen tree is an argument like
the batch: it has no gradient, no optimizer state, and is never part of what is donated.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft._argument_order import check_loss_order, check_order
from jaxpeft._schema import check_dtype_option
from jaxpeft.optim._finite import all_finite, stays_finite
from jaxpeft.train._loss_scale import SMALLEST, scale_of

LossFn = Callable[[Any, Any, Any, Any], tuple[jax.Array, jax.Array]]
"""`loss_fn(frozen, adapter, batch, key) -> (loss_sum, weight)`, two scalars."""

_with_paths, _key = jax.tree_util.tree_leaves_with_path, jax.tree_util.keystr

AxisName = Hashable | Sequence[Hashable]


class State(NamedTuple):
    """Everything that a step changes; the argument to donate."""

    step: jax.Array  # int32[], the number of steps taken so far
    adapter: Any  # {path: array}, or any pytree of float arrays
    opt_state: Any


class Metrics(NamedTuple):
    """What a step reports: scalars on the device, equal on all devices."""

    loss: jax.Array  # mean over the target tokens of all microbatches and devices
    grad_norm: jax.Array  # global norm over the adapter, before clipping
    weight: jax.Array  # sum of the weights: the number of target tokens
    # bool[], whether loss, gradient, update or new state was NaN or infinite: no update was made
    nonfinite: jax.Array
    # bool[], whether the gradient overflowed under `loss_scaled`: the scale was halved, no update
    overflow: jax.Array | bool = False


def init(adapter: Any, tx: optax.GradientTransformation) -> State:
    """The state before the first step.

    All arrays are copies. So donating the state deletes no array of the caller, and donates no
    buffer twice where an optimizer keeps the adapter itself in its state. Counters of the optimizer
    are put on the mesh of the adapter: on a mesh, put the adapter there first
    (`jax.device_put(adapter, NamedSharding(mesh, P()))`), or the step compiles twice.

    Args:
      adapter: From `split`, {path: array}, or any pytree of float arrays.
      tx: The optimizer.
    Returns:
      The state at step 0.

    Raises:
      ValueError: where the frozen tree was given instead of the adapter.
    """
    check_order("init(adapter, tx)", adapter)
    adapter = jax.tree.map(jnp.copy, adapter)
    opt_state = jax.tree.map(jnp.copy, tx.init(adapter))
    state = State(jnp.zeros((), jnp.int32), adapter, opt_state)
    meshes = {x.sharding.mesh for x in jax.tree.leaves(adapter) if _on_mesh(x)}
    if len(meshes) != 1:
        return state
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())
    return jax.tree.map(lambda x: x if _on_mesh(x) else jax.device_put(x, everywhere), state)


def _on_mesh(x):
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return concrete and isinstance(x.sharding, NamedSharding)


def train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    axis_name: AxisName | None = None,
    compute_dtype: Any = None,
    on_nan: str = "stop",
) -> Callable[[State, Any, Any, Any], tuple[State, Metrics]]:
    """A step of any optax optimizer on the mean loss per target token.

    The gradient is `sum(d loss_sum / d adapter) / sum(weight)`. Both sums are over microbatches and
    devices, and are divided once, so the result does not depend on how the tokens are spread over
    microbatches and devices.

    Jit the step with the state donated, on one device or on a mesh (shard the batch over its first
    axis, replicate or shard `frozen`, and leave out `axis_name`):

        step = jax.jit(train_step(loss_fn, tx), donate_argnums=0)

    or use it inside `jax.pmap` or `jax.shard_map`, with the name of the data-parallel axis:

        step = jax.pmap(train_step(loss_fn, tx, axis_name="data"), axis_name="data",
                        in_axes=(None, None, 0, None), out_axes=None)

    Args:
      loss_fn: `(frozen, adapter, batch, key) -> (loss_sum, weight)`: the *sum* of the losses
        of the batch's tokens and the sum of their weights (see `cross_entropy`).
      tx: The optimizer, of the adapter alone.
      gradient_accumulation_steps: Number n of microbatches into which a batch is split, one step
        for all of them. Microbatch i has the rows i, i + n, ...: on a mesh every row stays on its
        device.
      max_grad_norm: A gradient of a larger global norm over the adapter is scaled down to it.
        `None`: no clipping.
      axis_name: The named axis or axes of `jax.pmap` or `jax.shard_map` over which the batch is
        spread.
      compute_dtype: Dtype to which the adapter is cast for the forward and backward pass, such as
        `jnp.bfloat16`; gradients, moments and the adapter itself keep their own dtype. The frozen
        tree and the batch are not cast: store the base in the dtype in which it is to compute,
        since a cast here would be a second copy of it. `jnp.float16` needs the optimizer
        `loss_scaled(tx)`.
      on_nan: What to do where the loss, the gradient, the new adapter, or the new optimizer state
        (where it was finite) is not finite, which is flagged in the metrics. "stop" returns the
        state unchanged, "skip" returns it with the step number advanced: adapter and optimizer
        state stay as they were. Of an optimizer state in host memory (`paged`), where the loss and
        the gradient are finite, only those arrays stay whose own update is not finite.
    Returns:
      `step(state, frozen, batch, key) -> (state, metrics)`. The first axis of each leaf of `batch`
      is the rows. `key` is the same for all steps: the step number, the index on `axis_name` and
      the microbatch are folded in. With `None`, the key of `loss_fn` is `None`.
    Raises:
      ValueError: for an option out of its range, for a batch that `gradient_accumulation_steps`
        does not divide, for a `loss_fn` that takes the adapter before the frozen tree or does not
        return two scalars, for an adapter of integers, and for `compute_dtype=jnp.float16` without
        `loss_scaled`.
    """
    microbatches = gradient_accumulation_steps
    if microbatches < 1:
        raise ValueError(
            f"`gradient_accumulation_steps` is a number of microbatches, at least 1; got "
            f"{microbatches}."
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(
            f"`max_grad_norm` must be above 0, got {max_grad_norm}. Use None for no clipping."
        )
    check_loss_order(loss_fn)
    check_dtype_option("compute_dtype", compute_dtype)
    if on_nan not in ("stop", "skip"):
        raise ValueError(f'`on_nan` is "stop" or "skip", got {on_nan!r}.')

    def step(state, frozen, batch, key):
        scale = scale_of(state.opt_state)
        check_dtypes(frozen, state.adapter, compute_dtype, scale is not None)
        if key is not None:
            key = jax.random.fold_in(key, state.step)
            if axis_name is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        gradient = _summed_gradient(loss_fn, compute_dtype, scale)
        adapter = _varying(state.adapter, axis_name)
        sums = _over_microbatches(gradient, frozen, adapter, batch, key, microbatches)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)

        weight = sums.weight
        tokens = jnp.where(weight == 0, 1, weight)  # without tokens all sums are 0
        mean = jax.tree.map(lambda x: x / tokens.astype(x.dtype), sums)
        norm = optax.tree.norm(mean.gradient)
        bad = ~(jnp.isfinite(mean.loss) & jnp.isfinite(norm))
        overflow = jnp.zeros_like(bad)
        if scale is not None:
            overflow = jnp.isfinite(mean.loss) & ~jnp.isfinite(norm) & (scale > SMALLEST)

        grads = mean.gradient
        if max_grad_norm is not None:
            grads, _ = optax.clip_by_global_norm(max_grad_norm).update(grads, optax.EmptyState())
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.adapter)
        paged = any(map(_on_host, jax.tree.leaves(state.opt_state)))
        adapter, opt_state, bad = (_paged_update if paged else _update)(tx, grads, state, bad)
        if scale is not None:
            after = state.opt_state.after_overflow()
            opt_state = opt_state._replace(
                scale=jnp.where(overflow, after.scale, opt_state.scale),
                finite_steps=jnp.where(overflow, after.finite_steps, opt_state.finite_steps),
            )
        bad = bad & ~overflow
        number = state.step + 1
        if on_nan == "stop":
            number = jnp.where(bad, state.step, number)
        return State(number, adapter, opt_state), Metrics(mean.loss, norm, weight, bad, overflow)

    return step


def check_dtypes(frozen: Any, adapter: Any, compute_dtype: Any, scaled: bool) -> None:
    """Raises ValueError for dtypes that cannot be trained, and warns of underflow in float16."""
    leaves = {f"adapter{_key(path)}": x.dtype for path, x in _with_paths(adapter)}
    for name, dtype in leaves.items():
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"only floating-point arrays can be trained, but {name} is {dtype}. Leave it in "
                f"the frozen tree."
            )
        if dtype.itemsize == 1:
            raise ValueError(
                f"{name} is {dtype}, which is too narrow to add updates to. Keep the adapter in "
                f"float32 and cast it in `loss_fn`."
            )
    if compute_dtype is not None and _is_narrow(compute_dtype) and not scaled:
        raise ValueError(
            f"`compute_dtype={jnp.dtype(compute_dtype)}` rounds most gradients to zero. Scale the "
            f"loss, with the optimizer loss_scaled(tx), or compute in bfloat16."
        )
    if narrow := [name for name, dtype in leaves.items() if _is_narrow(dtype)]:
        warnings.warn(
            f"{narrow[0]} is float16, in which small updates, second moments and an eps of 1e-8 "
            f"are rounded to zero. Keep the adapter in float32 and pass compute_dtype=jnp.float16.",
            stacklevel=1,
        )
    for path, x in _with_paths(frozen):
        if not scaled and getattr(x, "dtype", None) == jnp.float16 and jnp.ndim(x) > 1:
            warnings.warn(
                f"frozen{_key(path)} is float16: gradients that pass through it are rounded to "
                f"zero below 6e-8. Scale the loss, with the optimizer loss_scaled(tx), or store "
                f"the base in bfloat16.",
                stacklevel=1,
            )
            return


def _is_narrow(dtype: Any) -> bool:
    """Whether small gradients underflow in a dtype (float16, float8)."""
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).tiny > 1e-30)


def _update(tx: Any, grads: Any, state: State, bad: jax.Array) -> tuple[Any, Any, jax.Array]:
    """The adapter and the optimizer state after a step, unchanged where the step is bad.

    XLA computes an elementwise update twice, once to test whether it is finite and once for its
    result, so that a donated state is still updated in place.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
    new = optax.apply_updates(state.adapter, updates), opt_state
    bad = bad | ~(all_finite(new[0]) & stays_finite(state.opt_state, opt_state))
    old = state.adapter, state.opt_state
    return *jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old), bad


def _on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _paged_update(tx: Any, grads: Any, state: State, bad: jax.Array) -> tuple[Any, Any, jax.Array]:
    """The same for a state in host memory, where `paged` itself keeps the state of a bad step.

    A selection afterwards would hold both states in host memory, and run there. Should a
    transformation around `paged` not pass `unless` on, a gradient of zeros does the least harm.

    Whether an update is finite is known for one piece at a time, when others are already written.
    So each array is kept or updated by itself, and `paged` returns an update of NaN where it has
    kept a state for that reason.
    """
    grads = jax.tree.map(lambda g: jnp.where(bad, 0, g), grads)
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(grads, state.opt_state, state.adapter, unless=bad)
    good = []

    def unless_bad(update, parameter):
        finite = all_finite(optax.apply_updates(parameter, update))
        good.append(finite)
        # -0.0 and not 0.0: it leaves a parameter of -0.0 as it is.
        return jnp.where(bad | ~finite, jnp.asarray(-0.0, update.dtype), update)

    def kept(new, old):
        if _on_host(new):
            return new
        finite = stays_finite(old, new)
        good.append(finite)
        return jnp.where(finite, new, old)

    updates = jax.tree.map(unless_bad, updates, state.adapter)
    opt_state = jax.tree.map(kept, opt_state, state.opt_state)
    bad = bad | ~functools.reduce(jnp.logical_and, good)
    return optax.apply_updates(state.adapter, updates), opt_state, bad


def in_dtype(loss_fn: LossFn, compute_dtype: Any) -> LossFn:
    """The loss with the adapter cast to `compute_dtype`; with `None`, the loss as it is."""
    if compute_dtype is None:
        return loss_fn

    def loss(frozen, adapter, batch, key):
        adapter = jax.tree.map(lambda x: x.astype(compute_dtype), adapter)
        return loss_fn(frozen, adapter, batch, key)

    return loss


def fill_float0(grads: Any, tree: Any) -> Any:
    """Gradients that optax accepts, for loops that keep one tree and mask the optimizer.

    `jax.grad(loss, allow_int=True)` gives integer arrays (the values of a quantized base)
    gradients of dtype float0, which cannot be added to anything. They are replaced by zeros of the
    array's own dtype; all other gradients stay.

    Args:
      grads: Gradients of `tree`, from `jax.grad(..., allow_int=True)`.
      tree: What was differentiated.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tree = {"values": jnp.array([1, 2], jnp.uint8), "scale": jnp.array(0.5)}
      >>> loss = lambda tree: jnp.sum(tree["values"] * tree["scale"])
      >>> grads = fill_float0(jax.grad(loss, allow_int=True)(tree), tree)
      >>> grads["values"].dtype.name, float(grads["scale"])
      ('uint8', 3.0)
    """
    return jax.tree.map(
        lambda g, x: jnp.zeros_like(x) if g.dtype == jax.dtypes.float0 else g, grads, tree
    )


class _Sums(NamedTuple):
    gradient: Any
    loss: jax.Array
    weight: jax.Array


def _summed_gradient(loss_fn, compute_dtype, scale=None):
    """`(frozen, adapter, batch, key) -> _Sums`, each at least in float32.

    With a scale, the function that is differentiated is the scale times roughly the mean loss, so
    that the scale does not depend on the number of tokens. Its factors are powers of two, which
    change no digit of the gradient.
    """

    cast_loss_fn = in_dtype(loss_fn, compute_dtype)

    def loss(frozen, adapter, batch, key):
        out = cast_loss_fn(frozen, adapter, batch, key)
        shapes = jax.tree.map(jnp.shape, out)
        if not isinstance(out, tuple) or shapes != ((), ()):
            raise ValueError(
                f"`loss_fn` must return (loss_sum, weight), two scalars: the sum of the losses "
                f"and of the tokens' weights. Got {type(out).__name__} of shapes {shapes}."
            )
        loss_sum, weight = jnp.asarray(out[0]), jax.lax.stop_gradient(jnp.asarray(out[1]))
        if scale is None:
            return loss_sum, (loss_sum, weight, None)
        factor = jnp.ldexp(scale, -jnp.frexp(weight.astype(scale.dtype))[1])
        return loss_sum * factor.astype(_wide(loss_sum.dtype)), (loss_sum, weight, factor)

    def gradient(frozen, adapter, batch, key):
        (_, (loss_sum, weight, factor)), grads = jax.value_and_grad(loss, argnums=1, has_aux=True)(
            frozen, adapter, batch, key
        )
        sums = jax.tree.map(_widen, _Sums(grads, loss_sum, weight))
        if factor is None:
            return sums
        return sums._replace(
            gradient=jax.tree.map(lambda g: g / factor.astype(g.dtype), sums.gradient)
        )

    return gradient


def _over_microbatches(gradient, frozen, adapter, batch, key, microbatches):
    if microbatches == 1:
        return gradient(frozen, adapter, batch, key)
    batch = jax.tree_util.tree_map_with_path(
        lambda path, x: _split_rows(path, x, microbatches), batch
    )

    def microbatch(index, rows):
        own = None if key is None else jax.random.fold_in(key, index)
        return gradient(frozen, adapter, rows, own)

    def add(total, xs):
        return jax.tree.map(jnp.add, total, microbatch(*xs)), None

    index = jnp.arange(microbatches)
    first = jax.tree.map(lambda x: x[0], (index, batch))
    shapes = jax.eval_shape(microbatch, *first)
    zeros = _Sums(
        # Zeros like the adapter, for its sharding.
        jax.tree.map(lambda x, s: jnp.zeros_like(x, s.dtype), adapter, shapes.gradient),
        jnp.zeros((), shapes.loss.dtype),
        jnp.zeros((), shapes.weight.dtype),
    )
    zeros = jax.tree.map(lambda x, s: _vary(x, _axes(s)), zeros, shapes)
    return jax.lax.scan(add, zeros, (index, batch))[0]


def _split_rows(path, x, n):
    """(rows, ...) -> (n, rows / n, ...), without moving rows between shards.

    The rows of one shard are contiguous. A reshape to (rows / n, n) keeps the sharded axis in
    front; one to (n, rows / n) would send most rows to another device.
    """
    if jnp.ndim(x) == 0 or x.shape[0] % n:
        raise ValueError(
            f"`gradient_accumulation_steps={n}` must divide the rows of the batch, got shape "
            f"{jnp.shape(x)} at batch{jax.tree_util.keystr(path)}."
        )
    rows = x.reshape(x.shape[0] // n, n, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1)


def _varying(tree, axis_name):
    """The tree marked as varying over devices, so that its gradient is not summed over them yet.

    Under `shard_map`, the gradient of a replicated value in a loss that differs by device is
    summed over devices automatically: in every microbatch, and then once more by our own sum.
    """
    if axis_name is None:
        return tree
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    return jax.tree.map(lambda x: _vary(x, names), tree)


def _vary(x, names):
    missing = tuple(name for name in names if name not in _axes(jax.typeof(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _axes(kind):
    """The named axes over which a value varies, of a shape or an abstract value."""
    manual = kind.manual_axis_type  # None in a shape that was made outside `shard_map`
    return manual.varying if manual else frozenset()


def _widen(x):
    return x.astype(_wide(x.dtype))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
