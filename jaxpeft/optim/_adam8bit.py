"""Adam whose two moments take 8 bits each, in blocks with a scale of their own.

A number of a block is stored as its share of the block's largest, in the dynamic format: a code
says how many leading digits after the decimal point are zero, and spends the bits that this leaves
on the digits that follow, so that large shares are fine-grained and small ones still there.

Codes become numbers and numbers codes by arithmetic. By the table of 256 numbers, XLA would make
float32 copies of the moments: on TPUs 4 bytes a number for a gather and 24 for a search.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class QuantizedMoment(NamedTuple):
    """An array in 8 bits: `decode(codes) * scales`, each scale over a block of numbers."""

    codes: jax.Array  # uint8[*shape]
    scales: jax.Array  # float32[*shape], but along one axis one for each block


class Adam8bitState(NamedTuple):
    """The state of `scale_by_adam8bit`; its moments are `Blocks`, or float32 where small."""

    count: Any  # int32[], the number of steps taken; Any, since tuples have a method `count`
    mu: Any  # first moments, in the structure of the parameters
    nu: Any  # second moments


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
    """AdamW with moments of 8 bits: `optax.adamw` in a quarter of its memory.

    Args:
      learning_rate: A number, or a schedule: step to number.
      b1, b2, eps, block, min_size: As in `scale_by_adam8bit`.
      weight_decay: Decay of the weights, times the learning rate.
      mask: Tree of bools, or a function that makes one of the parameters: which ones decay. `None`:
        all.

    Returns:
      An optax transformation whose updates are to be added to the parameters.

    Raises:
      ValueError: as `scale_by_adam8bit`.

    Example:
      >>> state = adamw8bit(1e-3).init({"w": jnp.zeros((256, 256)), "b": jnp.zeros(256)})
      >>> mu = state[0].mu
      >>> mu["w"].codes.dtype.name, mu["w"].scales.shape, mu["b"].dtype.name
      ('uint8', (1, 256), 'float32')

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022.
      https://arxiv.org/abs/2110.02861
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
      https://arxiv.org/abs/1711.05101
    """
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
    """Adam's direction, from moments that are kept in 8 bits.

    With g the gradient and t the number of the step, all in float32:

        m = b1 * m + (1 - b1) * g            stored in the signed map
        v = b2 * v + (1 - b2) * g ** 2       stored in the unsigned map
        update = (m / (1 - b1 ** t)) / (sqrt(v / (1 - b2 ** t)) + eps)

    The update is of m and v as computed; what is stored of them is what the next step starts from.

    Blocks run along one axis (`block_axis`), so that a moment is cut over a mesh like its
    parameter: the codes everywhere, the scales where the cuts are between blocks. Along axis -2 of
    a kernel (in, out) they are bitsandbytes' own, which lie along the rows of a PyTorch weight
    (out, in), if `in` is a multiple of the block; otherwise bitsandbytes' blocks run on into the
    next row, and here each row is cut into as few blocks of equal length as will do.

    Args:
      b1, b2: Decay rates of the moments.
      eps: Added to the denominator.
      block: Most numbers that share a scale: 2048 in the paper, 256 in bitsandbytes today.
      min_size: Elements from which on a parameter's moments are in 8 bits. Smaller ones keep
        float32, as in bitsandbytes.

    Returns:
      An optax transformation with a state of `2 * (1 + 4 / block)` bytes a number, 2.03 at 256.
      Updates are float32. One number that is not finite in a gradient spoils its whole block: pass
      finite ones (`train_step` does).

    Raises:
      ValueError: for an option out of its range.

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, sections 2.1, 2.2 and
      figure 2; the unsigned map for v in section 2.2. https://arxiv.org/abs/2110.02861
    """
    for name, rate in [("b1", b1), ("b2", b2)]:
        if not 0 <= rate < 1:
            raise ValueError(f"`{name}` is a decay rate, from 0 to below 1; got {rate}.")
    if block < 2:
        raise ValueError(f"`block` counts numbers that share a scale, at least 2; got {block}.")
    if min_size < 1:
        raise ValueError(f"`min_size` counts elements, at least 1; got {min_size}.")

    def init(params):
        def zeros(code):
            def zero(x):
                start = jnp.zeros_like(x, jnp.float32)
                if x.size < min_size:
                    return start
                # Like the parameter, for its sharding.
                return QuantizedMoment(
                    jnp.full_like(x, code, jnp.uint8), block_scales(start, block)
                )

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

            def cut_moments(cut):
                g, m_codes, m_scales, v_codes, v_scales = cut
                m = _shares(m_codes, True) * jnp.expand_dims(m_scales, axis + 1)
                v = _shares(v_codes, False) * jnp.expand_dims(v_scales, axis + 1)
                return moments(g.astype(jnp.float32), m, v)

            g, m_codes, v_codes = (_cut(x, axis, block) for x in (g, mu.codes, nu.codes))
            # Barriers: XLA would undo the cuts, and then store what it broadcasts.
            cut = jax.lax.optimization_barrier((g, m_codes, mu.scales, v_codes, nu.scales))
            scales = [jnp.max(jnp.abs(x), axis + 1) for x in cut_moments(cut)]
            # Computed once more from what is stored: XLA would keep m, v and the direction in
            # float32 until all scales are known, 12 bytes a number.
            cut, scales = jax.lax.optimization_barrier((cut, scales))
            m, v = cut_moments(cut)
            mu, nu = (
                QuantizedMoment(_join(_codes(_scaled(x, scale, axis), signed), axis, shape), scale)
                for x, scale, signed in [(m, scales[0], True), (v, scales[1], False)]
            )
            return _join(direction(m, v), axis, shape), mu, nu

        def leaf(g, mu, nu):
            if isinstance(mu, QuantizedMoment):
                return in_blocks(g, mu, nu)
            m, v = moments(g.astype(jnp.float32), mu, nu)
            return direction(m, v), m, v

        leaves, structure = jax.tree.flatten(updates)
        tree: Any = structure  # whose methods JAX's types do not show
        mus, nus = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        new = [leaf(*each) for each in zip(leaves, mus, nus, strict=True)]
        directions, mu, nu = (tree.unflatten([x[i] for x in new]) for i in range(3))
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(b, count):
    """1 - b ** count, to float32's last digits: as written, the difference loses three of them."""
    return -jnp.expm1(jnp.float32(math.log(b) if b else -math.inf) * count)


def block_axis(shape: tuple[int, ...], block: int = 256) -> int:
    """The axis along which blocks run: -2 or -1, whichever first is no shorter than a block.

    Where both are shorter, the longest axis: so the blocks are as full as they can be. Axis -2
    comes first since on TPUs to cut it into blocks costs nothing, while to cut the last one, whose
    tiles are of 128 numbers, moves them.

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
    return jnp.max(jnp.abs(_cut(x.astype(jnp.float32), axis, block)), axis + 1)


def encode(x: jax.Array, scales: jax.Array, *, signed: bool, block: int = 256) -> jax.Array:
    """The codes of the nearest numbers of the dynamic map.

    Args:
      x: Float[*shape] of at least one axis.
      scales: Its `block_scales`.
      signed: Which map; the unsigned one is for numbers that are at least 0.
      block: Most numbers along `block_axis(shape)` that share a scale.
    Returns:
      Uint8[*shape]. An error is at most half of what lies between the two nearest numbers of the
      map, times the block's scale; a block of zeros is exact.
    """
    axis = block_axis(x.shape, block)
    shares = _scaled(_cut(x.astype(jnp.float32), axis, block), scales, axis)
    return _join(_codes(shares, signed), axis, x.shape)


def decode(x: QuantizedMoment, *, signed: bool, block: int = 256) -> jax.Array:
    """Float32[*shape]: what `encode` stored."""
    shape = x.codes.shape
    axis = block_axis(shape, block)
    shares = _shares(_cut(x.codes, axis, block), signed)
    return _join(shares * jnp.expand_dims(x.scales, axis + 1), axis, shape)


def _scaled(cut, scales, axis):
    return cut / jnp.expand_dims(jnp.where(scales == 0, 1, scales), axis + 1)


def dynamic_map(signed: bool) -> jax.Array:
    """Float32[256]: the number of each code, ascending.

    The positive numbers between 0 and 1 come in seven decades, `10 ** (e - 7)` to `10 ** (e - 6)`
    for e = 0 ... 6. The signed map cuts nine tenths of decade e into `2 ** e` equal parts, the
    unsigned one into `2 ** (e + 1)`, and has the middle of each part; the lowest tenth of
    `[0, 10 ** (e - 6)]` is the decades' below. With 0 and 1, and in the signed map with the
    negatives of all but 1, these are 256.
    """
    return _shares(jnp.arange(256, dtype=jnp.uint8), signed)


DECADES = 7
ZERO_SIGNED, ZERO_UNSIGNED = 127, 0  # codes


def _shares(codes, signed):
    """The numbers of the dynamic map by their codes.

    Counted from the code of zero, part k of the decade with 2 ** f parts is number 2 ** f + k: its
    leading bit says which decade, those after it say which part.
    """
    n, first = codes.astype(jnp.int32), 1
    if signed:
        n, first = jnp.abs(n - ZERO_SIGNED), 0
    else:
        n = n + 1  # from 2 on: decade 0 has two parts
    bits = 31 - jax.lax.clz(jnp.maximum(n, 1))  # f
    parts = jnp.left_shift(1, bits)
    middle = (n - parts).astype(jnp.float32) + 0.5
    share = _ten_to(bits - first) * (0.1 + 0.9 * (middle / parts.astype(jnp.float32)))
    zero = codes == (ZERO_SIGNED if signed else ZERO_UNSIGNED)
    share = jnp.where(zero, 0.0, jnp.where(codes == 255, 1.0, share))
    return jnp.where(codes < ZERO_SIGNED, -share, share) if signed else share


def _codes(shares, signed):
    """The codes of the nearest numbers of the dynamic map, for float32 shares in [-1, 1]."""
    size = jnp.abs(shares)
    first = 0 if signed else 1
    edges = _edges(first)
    decade = sum((size > edge).astype(jnp.int32) for edge in edges[1:DECADES])
    parts = jnp.left_shift(1, decade + first)
    part = jnp.floor((size * _ten_to(decade, -1) - 0.1) / 0.9 * parts.astype(jnp.float32))
    n = parts + jnp.clip(part.astype(jnp.int32), 0, parts - 1)
    n = jnp.where(size > edges[0], n, 0)
    largest = 2 ** (DECADES + first)
    if signed:
        n = jnp.where(shares > edges[DECADES], largest, n)  # there is no -1
        return (ZERO_SIGNED + jnp.where(shares < 0, -n, n)).astype(jnp.uint8)
    n = jnp.where(shares > edges[DECADES], largest, n)
    return jnp.maximum(n - 1, 0).astype(jnp.uint8)


def _edges(first):
    """What lies half-way between the decades: below the first, between each two, above the last."""

    def low(e):
        return 10.0 ** (e - 6) * (0.1 + 0.45 / 2 ** (e + first))

    def high(e):
        return 10.0 ** (e - 6) * (1 - 0.45 / 2 ** (e + first))

    between = [(high(e - 1) + low(e)) / 2 for e in range(1, DECADES)]
    return [low(0) / 2, *between, (high(DECADES - 1) + 1) / 2]


def _ten_to(decade, sign=1):
    """10 ** (sign * (decade - 6)), exact, for 0 ... 6; by choice, not by a power or a table."""
    power = jnp.full(decade.shape, 10.0 ** (sign * -6), jnp.float32)
    for e in range(1, DECADES):
        power = jnp.where(decade >= e, jnp.float32(10.0 ** (sign * (e - 6))), power)
    return power


def _cut(x, axis, block):
    """(..., length, ...) -> (..., blocks, length of a block, ...), filled up with zeros.

    As few blocks as `block` allows, of one length, so that there is seldom anything to fill up.
    """
    length = x.shape[axis]
    blocks = -(-length // block)
    each = -(-length // blocks)
    if blocks * each > length:
        fill = [(0, 0)] * x.ndim
        fill[axis] = (0, blocks * each - length)
        x = jnp.pad(x, fill)
    return x.reshape(*x.shape[:axis], blocks, each, *x.shape[axis + 1 :])


def _join(x, axis, shape):
    """What `_cut` did, undone."""
    x = x.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(x, 0, shape[axis], axis=axis)
