"""Adam whose moments are stored in 8 bits, with one scale per block of entries.

An entry is stored as its ratio to the largest magnitude of its block, in the dynamic format: the
quantized value gives the number of leading zeros after the decimal point, and the remaining bits
give the digits that follow. So large ratios have a fine resolution, and small ones are not lost.

Quantization and dequantization use arithmetic. With a table of the 256 values, XLA would make
float32 copies of the moments: on TPUs 4 bytes per entry for a gather and 24 for a search.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class QuantizedMoment(NamedTuple):
    """A moment in 8 bits: `dynamic_map[values] * scales`, with one scale per block.

    Attributes:
      values: Quantized values, uint8[*shape].
      scales: float32, in `shape` with one entry per block along `block_axis(shape)`.
    """

    values: Any  # jax.Array
    scales: Any  # jax.Array


class Adam8bitState(NamedTuple):
    """The state of `scale_by_adam8bit`.

    Attributes:
      count: Number of updates so far, int32[].
      mu: First moments, in the structure of the parameters: each a `QuantizedMoment`, or float32
        for a small parameter.
      nu: Second moments, likewise.
    """

    count: Any  # jax.Array; Any, since tuples have a method `count`
    mu: Any
    nu: Any


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 1e-4,
    mask: Any = None,
    block: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with 8-bit moments: `optax.adamw` with a quarter of its state.

    The update of a parameter w is -learning_rate * (direction + weight_decay * w), with the
    direction of `scale_by_adam8bit`.

    Args:
      learning_rate: A number, or a schedule of the step.
      b1, b2, eps, block, min_size: As for `scale_by_adam8bit`.
      weight_decay: Strength of the weight decay, which is multiplied by the learning rate.
      mask: Tree of bools, or a function from the parameters to one: true where a parameter
        decays. `None` decays all.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: As `scale_by_adam8bit`.

    Example:
      >>> state = adamw8bit(1e-3).init({"w": jnp.zeros((256, 256)), "b": jnp.zeros(256)})
      >>> mu = state[0].mu
      >>> mu["w"].values.dtype.name, mu["w"].scales.shape, mu["b"].dtype.name
      ('uint8', (1, 256), 'float32')

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022.
      https://arxiv.org/abs/2110.02861
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
      https://arxiv.org/abs/1711.05101
    """
    _check_options("adamw8bit", b1, b2, block, min_size)
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps, block=block, min_size=min_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    block: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformation:
    """Adam's direction, with moments stored in 8 bits.

    With the gradient g of step t, all in float32:

        m = b1 * m + (1 - b1) * g            stored by the signed dynamic map
        v = b2 * v + (1 - b2) * g ** 2       stored by the unsigned dynamic map
        update = (m / (1 - b1 ** t)) / (sqrt(v / (1 - b2 ** t)) + eps)

    The update uses m and v before their quantization; the next step starts from the quantized ones.

    The blocks of a moment are along one axis (`block_axis`), so that it can be sharded like its
    parameter: the quantized values always, the scales where shards end between blocks. In a kernel
    (in, out) with blocks along axis -2, they are the blocks of bitsandbytes, along the rows of a
    PyTorch weight (out, in), if `in` is a multiple of the block size. Otherwise the blocks of
    bitsandbytes continue in the next row, and here each row has the fewest blocks of equal length.

    Args:
      b1: Decay rate of the first moments.
      b2: Decay rate of the second moments.
      eps: Added to the denominator.
      block: The largest number of entries that share a scale: 2048 in the paper, 256 in
        bitsandbytes today.
      min_size: The least number of elements of a parameter with 8-bit moments. Moments of
        smaller ones are float32, as in bitsandbytes.

    Returns:
      An Optax transformation with a state of 2 * (1 + 4 / block) bytes per parameter, 2.03 at a
      block of 256. Updates are float32. A gradient that is not finite spoils its whole block:
      pass finite gradients, as `jaxpeft.train.train_step` does.

    Raises:
      ValueError: An option is out of its range.

    Example:
      >>> tx = scale_by_adam8bit(min_size=1)
      >>> params = {"w": jnp.zeros((2, 4))}
      >>> updates, state = tx.update({"w": jnp.full((2, 4), 3.0)}, tx.init(params))
      >>> bool(jnp.allclose(updates["w"], 1.0)), state.nu["w"].values.dtype.name
      (True, 'uint8')

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, sections 2.1, 2.2 and
      figure 2; the unsigned map for v in section 2.2. https://arxiv.org/abs/2110.02861
    """
    _check_options("scale_by_adam8bit", b1, b2, block, min_size)

    def init(params):
        def zeros(quantized_zero):
            def zero(x):
                start = jnp.zeros_like(x, jnp.float32)
                if x.size < min_size:
                    return start
                # `full_like` has the sharding of the parameter.
                values = jnp.full_like(x, quantized_zero, jnp.uint8)
                return QuantizedMoment(values, block_scales(start, block))

            return jax.tree.map(zero, params)

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(ZERO_SIGNED), zeros(ZERO_UNSIGNED))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        correct1, correct2 = (_one_minus_power(b, count) for b in (b1, b2))

        def moments(g, m, v):
            return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * jnp.square(g)

        def direction(m, v):
            return (m / correct1) / (jnp.sqrt(v / correct2) + eps)

        def in_blocks(g, mu, nu):
            shape = g.shape
            axis = block_axis(shape, block)

            def moments_of(blocks):
                g, m_values, m_scales, v_values, v_scales = blocks
                m = _from_dynamic(m_values, True) * jnp.expand_dims(m_scales, axis + 1)
                v = _from_dynamic(v_values, False) * jnp.expand_dims(v_scales, axis + 1)
                return moments(g.astype(jnp.float32), m, v)

            g, m_values, v_values = (_to_blocks(x, axis, block) for x in (g, mu.values, nu.values))
            # Without barriers, XLA would undo the reshapes and store broadcast scales.
            blocks = jax.lax.optimization_barrier((g, m_values, mu.scales, v_values, nu.scales))
            scales = [jnp.max(jnp.abs(x), axis + 1) for x in moments_of(blocks)]
            # The barrier makes XLA compute the moments again: otherwise it would keep m, v and the
            # direction in float32 until all scales are known, 12 bytes per entry.
            blocks, scales = jax.lax.optimization_barrier((blocks, scales))
            m, v = moments_of(blocks)
            mu, nu = (
                QuantizedMoment(
                    _from_blocks(_to_dynamic(_ratios(x, scale, axis), signed), axis, shape), scale
                )
                for x, scale, signed in [(m, scales[0], True), (v, scales[1], False)]
            )
            return _from_blocks(direction(m, v), axis, shape), mu, nu

        def leaf(g, mu, nu):
            if isinstance(mu, QuantizedMoment):
                return in_blocks(g, mu, nu)
            m, v = moments(g.astype(jnp.float32), mu, nu)
            return direction(m, v), m, v

        leaves, structure = jax.tree.flatten(updates)
        tree: Any = structure  # JAX's types do not show its methods.
        mus, nus = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        new = [leaf(*each) for each in zip(leaves, mus, nus, strict=True)]
        directions, mu, nu = (tree.unflatten([x[i] for x in new]) for i in range(3))
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _check_options(caller, b1, b2, block, min_size):
    for name, decay in [("b1", b1), ("b2", b2)]:
        if not 0 <= decay < 1:
            raise ValueError(
                f"`{caller}({name}={decay})`: a decay rate must be in [0, 1), such as 0.9."
            )
    if block < 2:
        raise ValueError(
            f"`{caller}(block={block})`: `block` must be at least 2, the number of entries that "
            "share a scale."
        )
    if min_size < 1:
        raise ValueError(
            f"`{caller}(min_size={min_size})`: `min_size` must be at least 1, a number of elements."
        )


def _one_minus_power(b, count):
    """1 - b ** count at float32 precision; the difference itself would lose three digits."""
    return -jnp.expm1(jnp.float32(math.log(b) if b else -math.inf) * count)


def block_axis(shape: tuple[int, ...], block: int = 256) -> int:
    """The axis of the blocks: -2, or else -1, if it is at least as long as a block.

    If both are shorter, it is the longest axis, so that blocks are as full as possible. Axis -2
    comes first because on TPUs it can be divided into blocks at no cost, while the last one, with
    tiles of 128 entries, must be moved.

    Example:
      >>> block_axis((4096, 4096)), block_axis((64, 4096)), block_axis((5, 12, 3)), block_axis((9,))
      (0, 1, 1, 0)
    """
    last = len(shape) - 1
    for axis in (last - 1, last):
        if axis >= 0 and shape[axis] >= block:
            return axis
    return max(range(len(shape)), key=lambda axis: shape[axis])


def block_scales(x: jax.Array, block: int = 256) -> jax.Array:
    """The largest magnitude of each block: float32[*shape], with blocks along `block_axis`."""
    axis = block_axis(x.shape, block)
    return jnp.max(jnp.abs(_to_blocks(x.astype(jnp.float32), axis, block)), axis + 1)


def quantize(x: jax.Array, scales: jax.Array, *, signed: bool, block: int = 256) -> jax.Array:
    """Quantized values: indices of the nearest values of the dynamic map.

    Args:
      x: Floats of at least one axis, float[*shape].
      scales: Its `block_scales`.
      signed: Whether to use the signed map; the unsigned one needs x >= 0.
      block: The largest number of entries along `block_axis(shape)` that share a scale.

    Returns:
      uint8[*shape]. The error is at most half the distance of two neighbors in the map, times
      the scale of the block; a block of zeros is exact.
    """
    axis = block_axis(x.shape, block)
    ratios = _ratios(_to_blocks(x.astype(jnp.float32), axis, block), scales, axis)
    return _from_blocks(_to_dynamic(ratios, signed), axis, x.shape)


def dequantize(x: QuantizedMoment, *, signed: bool, block: int = 256) -> jax.Array:
    """The moment in float32[*shape], the inverse of `quantize`.

    Args:
      x: The quantized moment.
      signed, block: As for `quantize`.
    """
    shape = x.values.shape
    axis = block_axis(shape, block)
    ratios = _from_dynamic(_to_blocks(x.values, axis, block), signed)
    return _from_blocks(ratios * jnp.expand_dims(x.scales, axis + 1), axis, shape)


def _ratios(blocks, scales, axis):
    """Entries divided by the scale of their block, in [-1, 1]."""
    return blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales), axis + 1)


def dynamic_map(signed: bool) -> jax.Array:
    """float32[256]: the dynamic map, the value of each quantized value, ascending.

    The values between 0 and 1 are in seven decades, 10 ** (e - 7) to 10 ** (e - 6) for
    e = 0 ... 6. The signed map divides decade e into 2 ** e equal parts, the unsigned map into
    2 ** (e + 1), and has the center of each part. With 0 and 1, and in the signed map the
    negatives of all but 1, these are 256 values.

    Args:
      signed: Whether the map has negative values.
    """
    return _from_dynamic(jnp.arange(256, dtype=jnp.uint8), signed)


DECADES = 7
ZERO_SIGNED, ZERO_UNSIGNED = 127, 0  # the quantized values of zero


def _from_dynamic(values, signed):
    """The entries of the dynamic map at quantized values.

    Counted from the quantized value of zero, part k of the decade with 2 ** f parts has the index
    n = 2 ** f + k: its leading bit gives the decade, the bits after it give the part.
    """
    n, first = values.astype(jnp.int32), 1
    if signed:
        n, first = jnp.abs(n - ZERO_SIGNED), 0
    else:
        n = n + 1  # Decade 0 has two parts, so indices start at 2.
    bits = 31 - jax.lax.clz(jnp.maximum(n, 1))  # f
    parts = jnp.left_shift(1, bits)
    middle = (n - parts).astype(jnp.float32) + 0.5
    ratio = _ten_to(bits - first) * (0.1 + 0.9 * (middle / parts.astype(jnp.float32)))
    zero = values == (ZERO_SIGNED if signed else ZERO_UNSIGNED)
    ratio = jnp.where(zero, 0.0, jnp.where(values == 255, 1.0, ratio))
    return jnp.where(values < ZERO_SIGNED, -ratio, ratio) if signed else ratio


def _to_dynamic(ratios, signed):
    """The quantized values of the nearest entries of the dynamic map, of ratios in [-1, 1]."""
    size = jnp.abs(ratios)
    first = 0 if signed else 1
    edges = _edges(first)
    decade = sum((size > edge).astype(jnp.int32) for edge in edges[1:DECADES])
    parts = jnp.left_shift(1, decade + first)
    part = jnp.floor((size * _ten_to(decade, -1) - 0.1) / 0.9 * parts.astype(jnp.float32))
    n = parts + jnp.clip(part.astype(jnp.int32), 0, parts - 1)
    n = jnp.where(size > edges[0], n, 0)
    largest = 2 ** (DECADES + first)
    if signed:
        n = jnp.where(ratios > edges[DECADES], largest, n)  # The map has no -1.
        return (ZERO_SIGNED + jnp.where(ratios < 0, -n, n)).astype(jnp.uint8)
    n = jnp.where(ratios > edges[DECADES], largest, n)
    return jnp.maximum(n - 1, 0).astype(jnp.uint8)


def _edges(first):
    """The midpoints between 0 and the first decade, between decades, and between the last and 1."""

    def low(e):
        return 10.0 ** (e - 6) * (0.1 + 0.45 / 2 ** (e + first))

    def high(e):
        return 10.0 ** (e - 6) * (1 - 0.45 / 2 ** (e + first))

    between = [(high(e - 1) + low(e)) / 2 for e in range(1, DECADES)]
    return [low(0) / 2, *between, (high(DECADES - 1) + 1) / 2]


def _ten_to(decade, sign=1):
    """10 ** (sign * (decade - 6)) for decades 0 ... 6, exact: by selects, not a power or table."""
    power = jnp.full(decade.shape, 10.0 ** (sign * -6), jnp.float32)
    for e in range(1, DECADES):
        power = jnp.where(decade >= e, jnp.float32(10.0 ** (sign * (e - 6))), power)
    return power


def _to_blocks(x, axis, block):
    """(..., length, ...) -> (..., blocks, length of a block, ...), padded with zeros.

    The blocks are as few as `block` allows, and of equal length, so that padding is rare.
    """
    length = x.shape[axis]
    blocks = -(-length // block)
    each = -(-length // blocks)
    if blocks * each > length:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * each - length)
        x = jnp.pad(x, padding)
    return x.reshape(*x.shape[:axis], blocks, each, *x.shape[axis + 1 :])


def _from_blocks(x, axis, shape):
    """The inverse of `_to_blocks`."""
    x = x.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(x, 0, shape[axis], axis=axis)
