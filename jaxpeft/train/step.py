"""The train step: a pure function of (state, frozen, batch, key), for any loop and any mesh.

Only the adapter is differentiated, clipped and updated. The frozen tree is an argument like
the batch: it has no gradient, no optimizer state, and is never part of what is donated.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

LossFn = Callable[[Any, Any, Any, Any], tuple[jax.Array, jax.Array]]
"""`loss_fn(adapter, frozen, batch, key) -> (loss_sum, weight)`, two scalars."""

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
    nonfinite: jax.Array  # bool[], the loss or the norm was NaN or infinite


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
        is to compute in, since a cast here would be a second copy of it.
      on_nan: What the step returns where loss or gradient is not finite (flagged in the
        metrics): "stop" the state as it was, "skip" the same with the step counted.
        In both cases adapter and optimizer state stay as they were.
    Returns:
      `step(state, frozen, batch, key) -> (state, metrics)`. Each leaf of `batch` has the rows
      as its first axis. `key` is the same for all steps: the step number, the position on
      `axis_name` and the microbatch are folded in. `None` reaches `loss_fn` as `None`.
    Raises:
      ValueError: for an option out of its range, for a batch that `accumulate` does not
        divide, and for a `loss_fn` that does not return two scalars.
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` counts microbatches, at least 1; got {accumulate}.")
    if clip is not None and not clip > 0:
        raise ValueError(f"`clip` is the largest norm, above 0; got {clip}. None clips nothing.")
    if on_nan not in ("stop", "skip"):
        raise ValueError(f'`on_nan` is "stop" or "skip", got {on_nan!r}.')

    def step(state, frozen, batch, key):
        if key is not None:
            key = jax.random.fold_in(key, state.step)
            if axis_name is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        gradient = _summed_gradient(loss_fn, compute_dtype)
        adapter = _varying(state.adapter, axis_name)
        sums = _over_microbatches(gradient, adapter, frozen, batch, key, accumulate)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)

        weight = sums.weight
        tokens = jnp.where(weight == 0, 1, weight)  # without tokens all sums are 0
        mean = jax.tree.map(lambda x: x / tokens.astype(x.dtype), sums)
        norm = optax.tree.norm(mean.gradient)
        bad = ~(jnp.isfinite(mean.loss) & jnp.isfinite(norm))

        grads = mean.gradient
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.adapter)
        if any(map(_on_host, jax.tree.leaves(state.opt_state))):
            updates, opt_state = _paged_update(tx, grads, state, bad)
        else:
            updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        new = State(state.step + 1, optax.apply_updates(state.adapter, updates), opt_state)

        old = state if on_nan == "stop" else state._replace(step=new.step)
        # Selected there, an array on the host would be computed on the host.
        new = jax.tree.map(lambda n, o: n if _on_host(n) else jnp.where(bad, o, n), new, old)
        return new, Metrics(mean.loss, norm, weight, bad)

    return step


def _on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _paged_update(tx: Any, grads: Any, state: State, bad: jax.Array) -> tuple[Any, Any]:
    """The update of a state in host memory, which keeps itself where there is no step to take.

    Selected afterwards, both states would lie on the host and be selected there. Should
    something around `paged` not pass `unless` on, a gradient of zeros does least harm.
    """
    grads = jax.tree.map(lambda g: jnp.where(bad, 0, g), grads)
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(grads, state.opt_state, state.adapter, unless=bad)
    # -0.0 and not 0.0: it leaves a parameter of -0.0 as it is.
    updates = jax.tree.map(lambda u: jnp.where(bad, jnp.asarray(-0.0, u.dtype), u), updates)
    return updates, opt_state


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


def _summed_gradient(loss_fn, compute_dtype):
    """`(adapter, frozen, batch, key) -> _Sums`, each at least in float32."""

    cast_loss_fn = in_dtype(loss_fn, compute_dtype)

    def loss(adapter, frozen, batch, key):
        out = cast_loss_fn(adapter, frozen, batch, key)
        shapes = jax.tree.map(jnp.shape, out)
        if not isinstance(out, tuple) or shapes != ((), ()):
            raise ValueError(
                f"`loss_fn` must return (loss_sum, weight), two scalars: the sum of the losses "
                f"and of the tokens' weights. Got {type(out).__name__} of shapes {shapes}."
            )
        return jnp.asarray(out[0]), jax.lax.stop_gradient(jnp.asarray(out[1]))

    def gradient(adapter, frozen, batch, key):
        (loss_sum, weight), grads = jax.value_and_grad(loss, has_aux=True)(
            adapter, frozen, batch, key
        )
        return jax.tree.map(_widen, _Sums(grads, loss_sum, weight))

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
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
