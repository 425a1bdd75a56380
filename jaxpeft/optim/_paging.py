"""Optimizer states that lie in host memory and visit the device a few arrays at a time.

JAX has memory kinds: an array may lie in its device's memory or, pinned, in that of the host.
`paged(tx)` is `tx` with its state there. What `tx` does to one parameter seldom needs the state
of another, so the update is cut into the pieces that need nothing of each other, and each piece
waits for an earlier one to be back on the host: otherwise XLA fetches all arrays at once.
"""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpeft.optim._staging import in_pieces

HOST_MEMORY = "pinned_host"


def paged(
    tx: optax.GradientTransformation,
    *,
    min_size: int = 4096,
    in_flight: int = 1,
    missing: str = "error",
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state in host memory.

    The state is that of `tx`, leaf for leaf, so that a checkpoint of one is one of the other. To be
    used in a jitted step whose state is donated: then the compiled step has the paged arrays as
    host arguments, updated in place. `fit` and `train_step` take it like any other optimizer.
    Arrays in host memory belong to their device for good; let the parameters do so, too
    (`jax.device_put(adapter, jax.devices()[0])`, or a mesh), or the step compiles twice. A step of
    your own must return what is donated in the order in which it takes it, as `train_step` does:
    JAX gives donated buffers to results by shape alone, and would give parameters' to moments.

        step = jax.jit(train_step(loss_fn, paged(optax.adamw(1e-4))), donate_argnums=0)

    On the device are, at a time, the arrays of `in_flight` pieces, as they come and as they go.
    For `adamw` a piece is both moments of one parameter. Transformations that mix parameters
    (clipping, norms) are computed before or between pieces, as they need; one that mixes the paged
    states of all parameters, or keeps them under one `lax.cond` (`optax.MultiSteps`,
    `optax.apply_if_finite`), is a single piece: page inside it, `MultiSteps(paged(tx), k)`.

    Args:
      tx: Any optax transformation.
      min_size: Elements from which on an array is paged. Smaller ones, counters above all, stay on
        the device: a transfer costs more than their few bytes, and schedules read them anyway. So
        do, whatever this says, scalars, and random keys.
      in_flight: How many pieces may be on the device at once. One is least memory; with two, a
        piece may come while the one before it goes back.
      missing: What to do on a backend without host memory of its own, where nothing can be paged:
        "error", or "device" to leave the state where it is. The CPU backend has both kinds of
        memory by name, and they are one: everything works there, and saves nothing.

    Returns:
      A transformation whose `update` takes, beside what `tx` takes, `unless`: a bool[]; where it is
      true, no step is taken: the updates are zeros and the state stays. To select between old and
      new state outside would have XLA keep both on the host and select there, and to select
      between old and new parameters would have it keep all states on the device until then.

    Raises:
      ValueError: for an option out of its range; from `init`, on a backend without host memory.

    Example:
      >>> import jax.numpy as jnp
      >>> state = paged(optax.adamw(1e-3)).init({"w": jnp.zeros((64, 64))})
      >>> state[0].mu["w"].sharding.memory_kind, state[0].count.sharding.memory_kind
      ('pinned_host', 'device')

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
      https://arxiv.org/abs/2305.14314, section 3, "Paged Optimizers". There, the GPU's unified
      memory moves pages when it runs short of memory; here, arrays move in every step.
    """
    if min_size < 1:
        raise ValueError(f"`min_size` counts elements, at least 1; got {min_size}.")
    if in_flight < 1:
        raise ValueError(f"`in_flight` counts pieces, at least 1; got {in_flight}.")
    if missing not in ("error", "device"):
        raise ValueError(f'`missing` is "error" or "device", got {missing!r}.')
    inner = optax.with_extra_args_support(tx)

    def init(params):
        leaves = jax.tree.leaves(params)
        if any(not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) for x in leaves):
            return jax.tree.map(put_back, inner.init(params))
        if not _has_host_memory(leaves):
            if missing == "error":
                device = _device(leaves)
                raise ValueError(
                    f"`paged` needs a backend with {HOST_MEMORY!r} memory, {device} has "
                    f"{_memory_kinds(device)}. Use the optimizer as it is, or "
                    f'`paged(..., missing="device")`, which leaves the state on the device.'
                )
            return inner.init(params)
        # Jitted: done eagerly, the whole state would be on the device once. Then zeros know
        # nothing of the parameter that they are shaped like, so their places are given.
        abstract = jax.eval_shape(inner.init, params)
        made = jax.jit(
            lambda params: jax.tree.map(put_back, inner.init(params)),
            out_shardings=_places(abstract, params, min_size),
        )
        return made(params)

    def put_back(x):
        return jax.device_put(x, jax.memory.Space.Host) if _is_large(x, min_size) else x

    def on_host(x):
        lies_there = jax.typeof(x).memory_space == jax.memory.Space.Host
        return _is_large(x, min_size) and (lies_there or missing == "error")

    def update(updates, state, params=None, *, unless=None, **extra):
        def whole(updates, state, params):
            return inner.update(updates, state, params, **extra)

        places = jax.tree.map(on_host, state)
        return in_pieces(whole, updates, state, params, places, unless, in_flight)

    return optax.GradientTransformationExtraArgs(init, update)


def to_host(state: Any, *, min_size: int = 4096) -> Any:
    """An optimizer state where `paged` keeps it: its large arrays in host memory.

    For states that come from elsewhere (orbax among them), and for shapes: `jax.eval_shape` forgets
    where arrays lie, so a step that is to be compiled from shapes gets them from here.

    Args:
      state: Arrays, or `jax.ShapeDtypeStruct`s with a sharding.
      min_size: As in `paged`.

    Returns:
      The same tree. Each large leaf keeps its sharding, in memory of kind "pinned_host".

    Raises:
      ValueError: for a shape without sharding.

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
                f"`to_host` needs to know on which devices a shape lies; {x} at "
                f"{jax.tree_util.keystr(path)} has no sharding. Give it one: "
                f"`jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."
            )
        host = x.sharding.with_memory_kind(HOST_MEMORY)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
        if x.sharding == host and jax.typeof(x).memory_space != jax.memory.Space.Host:
            # Orbax restores arrays that lie on the host, with the type of arrays on the device.
            x = jax.device_put(x, x.sharding.with_memory_kind("device"))
        return jax.device_put(x, host)

    return jax.tree_util.tree_map_with_path(place, state)


def _is_large(x, min_size):
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    key = jax.dtypes.issubdtype(kind.dtype, jax.dtypes.prng_key)
    return kind.ndim > 0 and kind.size >= min_size and not key


def _device(leaves):
    """One of the devices on which the parameters lie."""
    return next(iter(leaves[0].sharding.device_set)) if leaves else jax.devices()[0]


def _memory_kinds(device):
    return [memory.kind for memory in device.addressable_memories()]


def _has_host_memory(leaves):
    return HOST_MEMORY in _memory_kinds(_device(leaves))


def _places(state, params, min_size):
    """The sharding of each leaf of a state: of the parameter in whose place it stands.

    A moment stands at the parameter's own path, below where the moments are. What stands at no
    parameter's path, or cannot be cut as the parameter is, lies everywhere on its mesh.
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

    def place(path, x):
        if mesh is None:  # all on one device; small arrays stay free to move
            return alone if _is_large(x, min_size) else None
        every = [*of_parameter(path), NamedSharding(mesh, PartitionSpec())]
        sharding = next(s for s in every if _cuts(s, x.shape))
        return sharding.with_memory_kind(HOST_MEMORY if _is_large(x, min_size) else None)

    return jax.tree_util.tree_map_with_path(place, state)


def _cuts(sharding, shape):
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
