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

from jaxpeft._schema import check_dtype_option
from jaxpeft.optim._finite import all_finite, stays_finite
from jaxpeft.train._loss_scale import SMALLEST, scale_of

LossFn = Callable[[Any, Any, Any, Any], tuple[jax.Array, jax.Array]]
"""`loss_fn(adapter, frozen, batch, key) -> (loss_sum, weight)`, two scalars."""

_with_paths, _key = jax.tree_util.tree_leaves_with_path, jax.tree_util.keystr

AxisName = Hashable | Sequence[Hashable]


class State(NamedTuple):
    """What a step changes, and all that it changes."""

    step: jax.Array  # int32[], the number of steps taken
    adapter: Any  # {path: array}, or any pytree of float arrays
    opt_state: Any


class Metrics(NamedTuple):
    """What a step tells, as scalars on the device, equal on all devices."""

    loss: jax.Array  # mean over the target tokens of all microbatches and devices
    grad_norm: jax.Array  # global norm over the adapter, before clipping
    weight: jax.Array  # sum of the weights: the number of target tokens
    # bool[], loss, gradient, update or new state was NaN or infinite: the update was not made
    nonfinite: jax.Array
    # bool[], the gradient overflowed under `loss_scaled`: the scale was halved, no update made
    overflow: jax.Array | bool = False


def init(adapter: Any, tx: optax.GradientTransformation) -> State:
    """The state before the first step.

    The arrays are copies, so that donating the state deletes nothing of the caller's, and no
    buffer twice where an optimizer keeps the adapter itself in its state. What has no place
    of its own (counters) goes where the adapter is: on a mesh, put the adapter there first
    (`jax.device_put(adapter, NamedSharding(mesh, P()))`), or the step compiles twice.
    """
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
    accumulate: int = 1,
    clip: float | None = None,
    axis_name: AxisName | None = None,
    compute_dtype: Any = None,
    on_nan: str = "stop",
) -> Callable[[State, Any, Any, Any], tuple[State, Metrics]]:
    """One step of any optax optimizer on the mean loss per target token.

    The gradient is `sum(d loss_sum) / sum(weight)`, both sums over microbatches and devices,
    divided once: how tokens are spread over microbatches and devices changes nothing.

    Use it jitted with the state donated, on one device or on a mesh (shard the batch over
    its first axis, replicate or shard `frozen`; leave `axis_name` alone):

        step = jax.jit(train_step(loss_fn, tx), donate_argnums=0)

    or, naming the data parallel axis, inside `jax.pmap` or `jax.shard_map`:

        step = jax.pmap(train_step(loss_fn, tx, axis_name="data"), axis_name="data",
                        in_axes=(None, None, 0, None), out_axes=None)

    Args:
      loss_fn: `(adapter, frozen, batch, key) -> (loss_sum, weight)`: the *sum* of the losses
        of the batch's tokens and the sum of their weights (see `cross_entropy`).
      tx: The optimizer. It sees the adapter and nothing else.
      accumulate: Number of microbatches that a batch is cut into. Microbatch i has the rows
        i, i + accumulate, ...: on a mesh every row stays where it is.
      clip: Largest global norm of the gradient over the adapter, or `None`.
      axis_name: The named axis or axes over which the batch is spread, where there are any.
      compute_dtype: Dtype that the adapter is cast to for the forward and backward pass,
        `jnp.bfloat16` say; gradients, moments and the adapter itself keep their own dtype.
        The frozen tree and the batch are passed as they are: store the base in the dtype it
        is to compute in, since a cast here would be a second copy of it. `jnp.float16` needs
        the optimizer `loss_scaled(tx)`.
      on_nan: What the step returns where the loss, the gradient, the new adapter or a number of
        the optimizer's state that was finite is not finite (flagged in the metrics): "stop" the
        state as it was, "skip" the same with the step counted. In both cases adapter and
        optimizer state stay as they were. With a state in host memory (`paged`) this holds for
        loss and gradient; where an update alone is not finite, those arrays stay as they were.
    Returns:
      `step(state, frozen, batch, key) -> (state, metrics)`. Each leaf of `batch` has the rows
      as its first axis. `key` is the same for all steps: the step number, the position on
      `axis_name` and the microbatch are folded in. `None` reaches `loss_fn` as `None`.
    Raises:
      ValueError: for an option out of its range, for a batch that `accumulate` does not
        divide, for a `loss_fn` that does not return two scalars, for an adapter of integers, and
        for `compute_dtype=jnp.float16` without `loss_scaled`.
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` counts microbatches, at least 1; got {accumulate}.")
    if clip is not None and not clip > 0:
        raise ValueError(f"`clip` is the largest norm, above 0; got {clip}. None clips nothing.")
    check_dtype_option("compute_dtype", compute_dtype)
    if on_nan not in ("stop", "skip"):
        raise ValueError(f'`on_nan` is "stop" or "skip", got {on_nan!r}.')

    def step(state, frozen, batch, key):
        scale = scale_of(state.opt_state)
        check_dtypes(state.adapter, frozen, compute_dtype, scale is not None)
        if key is not None:
            key = jax.random.fold_in(key, state.step)
            if axis_name is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        gradient = _summed_gradient(loss_fn, compute_dtype, scale)
        adapter = _varying(state.adapter, axis_name)
        sums = _over_microbatches(gradient, adapter, frozen, batch, key, accumulate)
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
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
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


def check_dtypes(adapter: Any, frozen: Any, compute_dtype: Any, scaled: bool) -> None:
    """Refuses what cannot be trained in its dtype, and warns of what float16 would round away."""
    leaves = {f"adapter{_key(path)}": x.dtype for path, x in _with_paths(adapter)}
    for name, dtype in leaves.items():
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"only floating-point arrays can be trained, but {name} is {dtype}. Leave it to "
                f"the frozen tree."
            )
        if dtype.itemsize == 1:
            raise ValueError(
                f"{name} is {dtype}, which no update can be added to. Keep the adapter in float32 "
                f"and cast it in `loss_fn`."
            )
    if compute_dtype is not None and _is_narrow(compute_dtype) and not scaled:
        raise ValueError(
            f"`compute_dtype={jnp.dtype(compute_dtype)}` makes zeros of most gradients. Scale the "
            f"loss, with the optimizer loss_scaled(tx), or compute in bfloat16."
        )
    if narrow := [name for name, dtype in leaves.items() if _is_narrow(dtype)]:
        warnings.warn(
            f"{narrow[0]} is float16, in which small updates, second moments and an eps of 1e-8 "
            f"are 0. Keep the adapter in float32 and pass compute_dtype=jnp.float16.",
            stacklevel=1,
        )
    for path, x in _with_paths(frozen):
        if not scaled and getattr(x, "dtype", None) == jnp.float16 and jnp.ndim(x) > 1:
            warnings.warn(
                f"frozen{_key(path)} is float16: gradients that pass through it become zeros "
                f"below 6e-8. Scale the loss, with the optimizer loss_scaled(tx), or keep the "
                f"base in bfloat16.",
                stacklevel=1,
            )
            return


def _is_narrow(dtype: Any) -> bool:
    """Whether a dtype lacks the small numbers that gradients are (float16, float8)."""
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).tiny > 1e-30)


def _update(tx: Any, grads: Any, state: State, bad: jax.Array) -> tuple[Any, Any, jax.Array]:
    """The adapter and the optimizer's state after a step, as they were where it is bad.

    XLA computes an elementwise update twice, for the question whether it is finite and for its
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
    """The same for a state in host memory, which keeps itself where there is no step to take.

    Selected afterwards, both states would lie on the host and be selected there. Should
    something around `paged` not pass `unless` on, a gradient of zeros does least harm.

    Whether an update is finite is known piece by piece, when others have gone. So each array keeps
    itself, and `paged` makes updates of NaN where it keeps a state for that reason.
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
    """The loss of the adapter cast to `compute_dtype`, or as it is for `None`."""
    if compute_dtype is None:
        return loss_fn

    def loss(adapter, frozen, batch, key):
        return loss_fn(jax.tree.map(lambda x: x.astype(compute_dtype), adapter), frozen, batch, key)

    return loss


def fill_float0(grads: Any, tree: Any) -> Any:
    """Gradients that optax can take, for loops that keep one tree and mask the optimizer.

    `jax.grad(loss, allow_int=True)` gives integer arrays (the codes of a quantized base)
    gradients of dtype float0, which cannot be added to anything. They become zeros of the
    array's own dtype; the others stay.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tree = {"codes": jnp.array([1, 2], jnp.uint8), "scale": jnp.array(0.5)}
      >>> loss = lambda tree: jnp.sum(tree["codes"] * tree["scale"])
      >>> grads = fill_float0(jax.grad(loss, allow_int=True)(tree), tree)
      >>> grads["codes"].dtype.name, float(grads["scale"])
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
    """`(adapter, frozen, batch, key) -> _Sums`, each at least in float32.

    With a scale, what is differentiated is about the mean times it, so that the scale need not
    follow the number of tokens. Powers of two alone change no digit of the gradient.
    """

    cast_loss_fn = in_dtype(loss_fn, compute_dtype)

    def loss(adapter, frozen, batch, key):
        out = cast_loss_fn(adapter, frozen, batch, key)
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

    def gradient(adapter, frozen, batch, key):
        (_, (loss_sum, weight, factor)), grads = jax.value_and_grad(loss, has_aux=True)(
            adapter, frozen, batch, key
        )
        sums = jax.tree.map(_widen, _Sums(grads, loss_sum, weight))
        if factor is None:
            return sums
        return sums._replace(
            gradient=jax.tree.map(lambda g: g / factor.astype(g.dtype), sums.gradient)
        )

    return gradient


def _over_microbatches(gradient, adapter, frozen, batch, key, accumulate):
    if accumulate == 1:
        return gradient(adapter, frozen, batch, key)
    batch = jax.tree_util.tree_map_with_path(lambda path, x: _cut(path, x, accumulate), batch)

    def microbatch(index, rows):
        own = None if key is None else jax.random.fold_in(key, index)
        return gradient(adapter, frozen, rows, own)

    def add(total, xs):
        return jax.tree.map(jnp.add, total, microbatch(*xs)), None

    index = jnp.arange(accumulate)
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


def _cut(path, x, accumulate):
    """(rows, ...) -> (accumulate, rows / accumulate, ...), without moving rows between shards.

    The rows of one shard are contiguous. Cutting them as (rows / accumulate, accumulate) keeps
    the sharded axis in front, (accumulate, rows / accumulate) would send most rows away.
    """
    if jnp.ndim(x) == 0 or x.shape[0] % accumulate:
        raise ValueError(
            f"`accumulate={accumulate}` must divide the rows of the batch, got shape "
            f"{jnp.shape(x)} at batch{jax.tree_util.keystr(path)}."
        )
    rows = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1)


def _varying(tree, axis_name):
    """The tree as each device's own, so that its gradient is not summed over devices yet.

    Under `shard_map`, the gradient of a replicated value in a loss that differs by device is
    summed over devices at once: in every microbatch, and then once more by our own sum.
    """
    if axis_name is None:
        return tree
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    return jax.tree.map(lambda x: _vary(x, names), tree)


def _vary(x, names):
    missing = tuple(name for name in names if name not in _axes(jax.typeof(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _axes(kind):
    """The named axes along which a value differs, of a shape or an abstract value."""
    manual = kind.manual_axis_type  # None in a shape that was made outside `shard_map`
    return manual.varying if manual else frozenset()


def _widen(x):
    return x.astype(_wide(x.dtype))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
