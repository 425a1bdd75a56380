"""Optimizer states in host memory, fetched to the device a few arrays at a time.

JAX has memory kinds: an array may be in the memory of its device, or pinned in that of the host.
`paged(tx)` is `tx` with its state in host memory. The update of one parameter seldom needs the
state of another, so the update is divided into independent stages, and each stage waits until an
earlier one is back in host memory: otherwise XLA would fetch all arrays at once.
"""

from typing import Any, Literal

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpeft.optim._staging import staged_update

HOST_MEMORY = "pinned_host"


def paged(
    tx: optax.GradientTransformation,
    *,
    min_size: int = 4096,
    max_in_flight: int = 1,
    if_unsupported: Literal["error", "device"] = "error",
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state in host memory, so that it needs little memory of the device.

    The updates and the state are those of `tx`, leaf for leaf, so checkpoints of one can be
    restored into the other. Use it in a jitted step whose state is donated: the compiled step
    then updates the paged arrays in host memory in place. `jaxpeft.train.fit` and `train_step`
    take it like any other optimizer.

        step = jax.jit(train_step(loss_fn, paged(optax.adamw(1e-4))), donate_argnums=0)

    Arrays in host memory are committed to their device. Commit the parameters, too
    (`jax.device_put(adapter, jax.devices()[0])`, or a mesh), or the step compiles twice. A step
    of your own must return donated arguments in the order in which it takes them, as
    `train_step` does: JAX matches donated buffers to results by shape alone, and would otherwise
    give buffers of parameters to moments.

    At most `max_in_flight` stages are on the device at a time. For `adamw` a stage is both moments
    of one parameter. Transformations that mix gradients of all parameters (clipping by a global
    norm) run before or between the stages. One that mixes the paged states of all parameters, or
    has them under one `lax.cond` (`optax.MultiSteps`, `optax.apply_if_finite`), is a single stage:
    page inside it, `MultiSteps(paged(tx), k)`.

    Args:
      tx: An Optax transformation.
      min_size: The least number of elements of a paged array. Smaller arrays stay on the device:
        a transfer costs more than their few bytes, and schedules read them. Scalars and
        PRNG keys always stay on the device.
      max_in_flight: Number of stages that may be on the device at once. 1 needs the least
        memory; with 2, one stage may be fetched while the previous one is written back.
      if_unsupported: On a backend without host memory of its own: "error" raises, "device"
        leaves the state on the device. The CPU backend has both memory kinds by name, but they
        are the same memory: everything works there, and saves nothing.

    Returns:
      A transformation whose `update` takes the extra argument `unless`, bool[]: where it is true,
      no step is taken, so the updates are zeros and the state stays. A selection between the old
      and new state outside of `update` would keep both in host memory, and one between old and
      new parameters would keep all states on the device until then.

    Raises:
      ValueError: An option out of its range; from `init`, a backend without host memory.

    Example:
      >>> import jax.numpy as jnp
      >>> state = paged(optax.adamw(1e-3)).init({"w": jnp.zeros((64, 64))})
      >>> state[0].mu["w"].sharding.memory_kind, state[0].count.sharding.memory_kind
      ('pinned_host', 'device')

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3, "Paged
      Optimizers". https://arxiv.org/abs/2305.14314. There, unified memory moves pages when the
      GPU runs out of memory; here, arrays move in every step.
    """
    if min_size < 1:
        raise ValueError(
            f"`paged(min_size={min_size})`: `min_size` must be at least 1, a number of elements."
        )
    if max_in_flight < 1:
        raise ValueError(
            f"`paged(max_in_flight={max_in_flight})`: `max_in_flight` must be at least 1, a number "
            "of stages."
        )
    if if_unsupported not in ("error", "device"):
        raise ValueError(
            f"`paged(if_unsupported={if_unsupported!r})`: `if_unsupported` must be 'error' or "
            "'device'."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params):
        leaves = jax.tree.leaves(params)
        if any(not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) for x in leaves):
            return jax.tree.map(to_host_memory, inner.init(params))
        if not _has_host_memory(leaves):
            if if_unsupported == "error":
                device = _device(leaves)
                raise ValueError(
                    f"`paged` needs a backend with {HOST_MEMORY!r} memory, but {device} has "
                    f"{_memory_kinds(device)}. Use the optimizer without `paged`, or "
                    "`paged(..., if_unsupported='device')`, which leaves the state on the device."
                )
            return inner.init(params)
        # Jitted, since an eager init would have the whole state on the device. Under jit, zeros do
        # not inherit the sharding of their parameter, so the shardings are given.
        abstract = jax.eval_shape(inner.init, params)
        made = jax.jit(
            lambda params: jax.tree.map(to_host_memory, inner.init(params)),
            out_shardings=_host_shardings(abstract, params, min_size),
        )
        return made(params)

    def to_host_memory(x):
        return jax.device_put(x, jax.memory.Space.Host) if _is_large(x, min_size) else x

    def on_host(x):
        in_host_memory = jax.typeof(x).memory_space == jax.memory.Space.Host
        return _is_large(x, min_size) and (in_host_memory or if_unsupported == "error")

    def update(updates, state, params=None, *, unless=None, **extra_args):
        def inner_update(updates, state, params):
            return inner.update(updates, state, params, **extra_args)

        paged_leaves = jax.tree.map(on_host, state)
        return staged_update(
            inner_update, updates, state, params, paged_leaves, unless, max_in_flight
        )

    return optax.GradientTransformationExtraArgs(init, update)


def to_host(state: Any, *, min_size: int = 4096) -> Any:
    """An optimizer state with its large arrays in host memory, as `paged` keeps it.

    For states from elsewhere, such as Orbax, and for shapes: `jax.eval_shape` drops memory kinds,
    so a step that is compiled from shapes needs this.

    Args:
      state: Arrays, or `jax.ShapeDtypeStruct`s with a sharding.
      min_size: As for `paged`.

    Returns:
      The same tree. Each large leaf has its sharding with memory kind "pinned_host".

    Raises:
      ValueError: A shape without a sharding; names its path.

    Example:
      >>> import jax.numpy as jnp
      >>> to_host({"m": jnp.zeros(4096)})["m"].sharding.memory_kind
      'pinned_host'
    """

    def place(path, x):
        if not _is_large(x, min_size):
            return x
        if getattr(x, "sharding", None) is None:
            raise ValueError(
                f"`to_host`: {x} at {jax.tree_util.keystr(path)} has no sharding, so its devices "
                "are unknown. Give it one: `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."
            )
        host = x.sharding.with_memory_kind(HOST_MEMORY)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
        if x.sharding == host and jax.typeof(x).memory_space != jax.memory.Space.Host:
            # Orbax restores arrays in host memory with the type of arrays on the device.
            x = jax.device_put(x, x.sharding.with_memory_kind("device"))
        return jax.device_put(x, host)

    return jax.tree_util.tree_map_with_path(place, state)


def _is_large(x, min_size):
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    key = jax.dtypes.issubdtype(kind.dtype, jax.dtypes.prng_key)
    return kind.ndim > 0 and kind.size >= min_size and not key


def _device(leaves):
    """One of the devices of the parameters."""
    return next(iter(leaves[0].sharding.device_set)) if leaves else jax.devices()[0]


def _memory_kinds(device):
    return [memory.kind for memory in device.addressable_memories()]


def _has_host_memory(leaves):
    return HOST_MEMORY in _memory_kinds(_device(leaves))


def _host_shardings(state, params, min_size):
    """The sharding of each leaf of a state: that of its parameter, with large leaves on the host.

    The path of a moment ends with the path of its parameter. A leaf without a parameter, or with
    a shape that the parameter's sharding does not divide, is replicated over the mesh.
    """
    shardings = {
        path: x.sharding
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(x.sharding, NamedSharding)
    }
    mesh = next(iter(shardings.values())).mesh if shardings else None
    alone = SingleDeviceSharding(_device(jax.tree.leaves(params)), memory_kind=HOST_MEMORY)

    def of_parameter(path):
        for begin in range(len(path)):
            for end in range(len(path), begin, -1):
                if path[begin:end] in shardings:
                    yield shardings[path[begin:end]]

    def sharding_of(path, x):
        if mesh is None:  # One device; small arrays stay uncommitted.
            return alone if _is_large(x, min_size) else None
        candidates = [*of_parameter(path), NamedSharding(mesh, PartitionSpec())]
        sharding = next(s for s in candidates if _divides(s, x.shape))
        return sharding.with_memory_kind(HOST_MEMORY if _is_large(x, min_size) else None)

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def _divides(sharding, shape):
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
