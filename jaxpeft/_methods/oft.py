"""OFT: a rotation of the inputs, block by block."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import _compat as compat
from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._operand import Operand
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, STACK, Unsupported, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class RotatedIn(Weight):
    """The matrix `R @ w`, where R turns the inputs in blocks of b: x @ R, then w.

    Block k of R lies in rows k b to (k + 1) b of `rotation` (in, b), transposed. With a stride of
    1, a block is b neighbours; with one of s = 2, 4, ..., it is two runs of b / 2, of which the
    second begins s runs after the first.
    """

    w: Any = base_weight()
    rotation: Any = axes("in", "block")
    block: int = static()
    stride: int = static(1)

    local_in = local_out = True

    def granularity(self, field, axis):
        """Blocks stay whole, and so do the runs that they take from."""
        del field
        whole = self.block * self.stride
        return (whole, whole) if axis == IN else (1, 1)

    def forward(self, x):
        """x @ (R @ w) = (x @ R) @ w."""
        return self._turned(x) @ self.w

    def transposed(self, y):
        """y @ (R @ w).T = (y @ w.T) @ R.T."""
        return self._turned(y @ self.w.T, back=True)

    def materialize(self):
        return as_sharded(self._rotated, dense(self.w), self.rotation)

    def _rotated(self, w, rotation):
        """R @ w, column by column."""
        blocks = self._gathered(w.T).reshape(w.shape[1], -1, self.block)
        turns = rotation.reshape(-1, self.block, self.block)
        out = jnp.einsum("mkj,kji->mki", blocks, turns)
        return self._scattered(out.reshape(w.shape[1], -1)).T

    def _turned(self, x, back=False):
        """x @ R, or x @ R.T."""
        op, b = self.rotation, self.block
        *experts, n, _ = op.shape
        if x.shape[-1] != n:
            raise Unsupported("a rotation of inputs that are not all there at once")
        turns = jnp.moveaxis(op.array.reshape(*experts, n // b, b, b), len(experts), 0)
        blocks = jnp.moveaxis(self._gathered(x).reshape(*x.shape[:-1], n // b, b), -2, 0)
        site = op.site
        # As a map from a block to inputs, which a convolution refuses.
        roles = ("block", IN) if back else (IN, "block")
        if experts:  # in a ragged product, where every expert and block is a group of its own
            site = site.with_arrays({"groups": jnp.tile(site.arrays["groups"], n // b)})
            every = Operand(turns.reshape(-1, b, b), (STACK, *roles), "block", IN, site)
            y = (blocks.reshape(-1, b) @ every).reshape(blocks.shape)
        else:
            y = jax.vmap(lambda x, turn: x @ Operand(turn, roles, "block", IN, site))(blocks, turns)
        return self._scattered(jnp.moveaxis(y, 0, -2).reshape(x.shape)).astype(x.dtype)

    def _gathered(self, x):
        """The entries (..., in) so that those of a block are neighbours."""
        return self._swapped(x, 2, self.stride)

    def _scattered(self, x):
        return self._swapped(x, self.stride, 2)

    def _swapped(self, x, first, second):
        if self.stride == 1:
            return x
        runs = x.reshape(*x.shape[:-1], -1, first, second, self.block // 2)
        return jnp.swapaxes(runs, -3, -2).reshape(x.shape)


@weight
class Orthogonal(Weight):
    """The matrix `R @ w`, R of blocks (I + Q) (I - Q)^-1 with the skew-symmetric Q trained.

    `skew` (in / b, b (b - 1) / 2) holds what stands above the diagonal of each Q, row by row;
    (1, ...) where all blocks are one.
    """

    w: Any = base_weight()
    skew: Any = axes("in", "pair")
    block: int = static()
    blocks: int = static()
    share: bool = static(False)
    terms: int | None = static(None)

    local_in = local_out = True

    def granularity(self, field, axis):
        """One row of numbers for each block of inputs."""
        del field
        return (1, 1) if axis != IN else (0, 0) if self.share else (self.block, 1)

    def derived(self):
        return {"rotation": self._rotation(self.skew.array)}

    def acting(self, **derived):
        return RotatedIn(self.w, derived["rotation"], self.block, 1)

    def materialize(self):
        return self.acting(rotation=self._rotation(self.skew)).materialize()

    def _rotation(self, skew):
        turns = rotations(skew, self.block, self.terms)
        b = self.block
        return jnp.broadcast_to(turns, (self.blocks, b, b)).reshape(-1, b)


def rotations(skew: jax.Array, block: int, terms: int | None = None) -> jax.Array:
    """The transposes of (I + Q) (I - Q)^-1: (..., b (b - 1) / 2) to (..., b, b).

    Args:
      skew: What stands above the diagonal of each Q, row by row.
      block: b.
      terms: Powers of Q kept of the inverse, I + Q + ... + Q^terms; `None` solves for it.
    """
    upper = np.triu_indices(block, 1)
    place = np.zeros((block, block), int)
    place[upper] = np.arange(len(upper[0]))
    sign = np.zeros((block, block), int)
    sign[upper] = 1
    wide = skew.astype(jnp.promote_types(skew.dtype, jnp.float32))
    q = wide[..., place + place.T] * (sign - sign.T).astype(wide.dtype)
    # R.T = (I + Q)^-1 (I - Q), since Q.T is -Q and the two factors commute.
    one = jnp.eye(block, dtype=wide.dtype)
    if terms is None:
        return jnp.linalg.solve(one + q, one - q)
    inverse = one
    with jax.default_matmul_precision("highest"):
        for _ in range(terms):
            inverse = one - q @ inverse
        return inverse - q @ inverse


@register_method
def oft(
    block: int | Mapping[str, int],
    sites: Sites,
    *,
    share: bool = False,
    terms: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Orthogonal finetuning: the inputs of a weight are turned, all angles between columns stay.

    Each selected matrix `w` (in, out) becomes `R @ w`, R block-diagonal with orthogonal blocks
    (I + Q) (I - Q)^-1 of Cayley's form, where the skew-symmetric Q start at zero, so that
    training starts at the base model. R is computed once for each call, in * block^2 operations.
    A product is (x @ R) @ w: in * block more multiplications for each token than the base's,
    whatever there is of outputs.

    Args:
      block: Inputs in a block. Divides `in`. A mapping from path patterns gives each target
        its own; the first match wins.
      sites: The matrices to adapt: linear ones. Where a convolution or a lookup meets one, it
        is turned into a dense array, with a warning.
      share: Whether all blocks of a weight are one.
      terms: `None` solves for the inverse, so that R is orthogonal to rounding. A number keeps as
        many powers of its series, I + Q + ... + Q^terms: products only, and an R that is
        orthogonal to O(|Q|^(terms + 1)). What `peft` calls 5 terms are 3 here.
      dtype: Of the trained numbers. R is computed in float32 at least.

    Returns:
      A method with (in / block) * block * (block - 1) / 2 trained numbers per matrix, or
      block * (block - 1) / 2 where the block is shared.

    Raises:
      ValueError: A block that does not divide a weight's inputs (names it, and what does), or a
        part of the outputs is selected, or `terms` is below 1.

    References:
      Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, section 3.
      https://arxiv.org/abs/2306.07280
      Qiu et al., Orthogonal Finetuning Made Scalable, 2025 (inputs in the place of weights, and
      the series). https://arxiv.org/abs/2506.19847
    """
    if terms is not None and terms < 1:
        raise ValueError(f"`oft(terms={terms})`: keep 1 or more, or give None to solve exactly.")
    sizes = by_pattern(block, sites, "block")
    check_whole("oft", sites)
    for path, site in sites.items():
        check_blocks("oft", "block", sizes[path], site)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        b = sizes[site.path]
        blocks = site.size(IN) // b
        shape = (*site.stack, 1 if share else blocks, b * (b - 1) // 2)
        skew = Trainable(jnp.zeros(shape, dtype))
        weight = Orthogonal(view.weight, skew, b, blocks, share, terms)
        return dataclasses.replace(view, weight=weight)

    options = dict(block=block, sites=sites, share=share, terms=terms, dtype=dtype)
    return Method(
        "oft", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="oft")
    )


def as_sharded(f: Callable[..., jax.Array], w: jax.Array, *others: jax.Array) -> jax.Array:
    """f(w, *others) of w's shape; where shardings are part of the types, it has that of w.

    Args:
      f: Runs under the compiler's choice of shardings.
      w: A matrix.
      others: What else f takes.
    """
    sharding = compat.typed_sharding(jax.typeof(w))
    if sharding is None:
        return f(w, *others)
    return jax.sharding.auto_axes(f, out_sharding=sharding)(w, *others)


def check_blocks(
    caller: str, name: str, block: int, site: Site, side: str = IN, doublings: int = 0
) -> None:
    """Raises ValueError where blocks do not fill a side of a weight; says which would.

    Args:
      caller, name: The method and the option, for the message.
      block: Entries in a block.
      site, side: The weight, and which of its sides.
      doublings: How often blocks join by two, for which they need halves.
    """
    size, joined = site.size(side), 2**doublings

    def fits(n: int) -> bool:
        return n >= 2 and size % (n * joined) == 0 and not (doublings and n % 2)

    if fits(block):
        return
    near = sorted(filter(fits, range(2, size + 1)), key=lambda n: abs(math.log(n / max(block, 1))))
    would = ", ".join(map(str, sorted(near[:8]))) or "none"
    times = f"an even number, {joined} times of which fills" if doublings else "a number that fills"
    raise ValueError(
        f"`{caller}({name}={block})`: '{site.path}' of shape {site.shape} has {size} {side}puts. "
        f"Choose {times} them in whole blocks: {would}; or leave this weight out of the sites."
    )
