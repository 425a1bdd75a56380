"""OFT: a block-diagonal rotation of the inputs."""

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
class RotatedInputs(Weight):
    """The matrix `R @ w`, where R (in, in) rotates the inputs in blocks of b = `block_size`.

    Rows k b to (k + 1) b of `rotation` (in, b) hold the transpose of block k of R. With a stride
    of 1, a block is b neighbouring inputs. With a stride of s = 2, 4, ..., it is two runs of b / 2
    neighbouring inputs, of which the second begins s runs after the first.
    """

    w: Any = base_weight()
    rotation: Any = axes("in", "block")
    block_size: int = static()
    stride: int = static(1)

    local_in = local_out = True

    def granularity(self, field, axis):
        """Blocks stay whole, and so do the inputs between their two runs."""
        del field
        whole = self.block_size * self.stride
        return (whole, whole) if axis == IN else (1, 1)

    def forward(self, x):
        """x @ (R @ w) = (x @ R) @ w."""
        return self._rotated_inputs(x) @ self.w

    def transposed(self, y):
        """y @ (R @ w).T = (y @ w.T) @ R.T."""
        return self._rotated_inputs(y @ self.w.T, transpose=True)

    def materialize(self):
        return as_sharded(self._rotated_matrix, dense(self.w), self.rotation)

    def _rotated_matrix(self, w, rotation):
        """R @ w, computed column by column."""
        blocks = self._to_block_order(w.T).reshape(w.shape[1], -1, self.block_size)
        rotations = rotation.reshape(-1, self.block_size, self.block_size)
        out = jnp.einsum("mkj,kji->mki", blocks, rotations)
        return self._to_input_order(out.reshape(w.shape[1], -1)).T

    def _rotated_inputs(self, x, transpose=False):
        """x @ R, or x @ R.T."""
        op, b = self.rotation, self.block_size
        *experts, n, _ = op.shape
        if x.shape[-1] != n:
            raise Unsupported("a rotation of inputs that are not all present at once")
        rotations = jnp.moveaxis(op.array.reshape(*experts, n // b, b, b), len(experts), 0)
        blocks = jnp.moveaxis(self._to_block_order(x).reshape(*x.shape[:-1], n // b, b), -2, 0)
        site = op.site
        # These roles make it a map from a block to inputs, which a convolution refuses.
        roles = ("block", IN) if transpose else (IN, "block")
        if experts:  # a ragged product, in which every block of every expert is its own group
            site = site.with_arrays({"groups": jnp.tile(site.arrays["groups"], n // b)})
            stacked = Operand(rotations.reshape(-1, b, b), (STACK, *roles), "block", IN, site)
            y = (blocks.reshape(-1, b) @ stacked).reshape(blocks.shape)
        else:
            y = jax.vmap(lambda x, r: x @ Operand(r, roles, "block", IN, site))(blocks, rotations)
        return self._to_input_order(jnp.moveaxis(y, 0, -2).reshape(x.shape)).astype(x.dtype)

    def _to_block_order(self, x):
        """The inputs (..., in) in an order in which those of a block are neighbours."""
        return self._swapped(x, 2, self.stride)

    def _to_input_order(self, x):
        """Inverse of `_to_block_order`."""
        return self._swapped(x, self.stride, 2)

    def _swapped(self, x, first, second):
        if self.stride == 1:
            return x
        runs = x.reshape(*x.shape[:-1], -1, first, second, self.block_size // 2)
        return jnp.swapaxes(runs, -3, -2).reshape(x.shape)


@weight
class CayleyRotation(Weight):
    """The matrix `R @ w`, with blocks (I + Q) (I - Q)^-1 of R and trainable skew-symmetric Q.

    `skew` (in / b, b (b - 1) / 2) holds the entries above the diagonal of each Q, row by row; it
    is (1, b (b - 1) / 2) if all blocks share one Q.
    """

    w: Any = base_weight()
    skew: Any = axes("in", "pair")
    block_size: int = static()
    n_blocks: int = static()
    block_share: bool = static(False)
    neumann_terms: int | None = static(None)

    local_in = local_out = True

    def granularity(self, field, axis):
        """One row of `skew` belongs to each block of inputs."""
        del field
        if axis != IN:
            return 1, 1
        return (0, 0) if self.block_share else (self.block_size, 1)

    def derived(self):
        return {"rotation": self._rotation(self.skew.array)}

    def acting(self, **derived):
        return RotatedInputs(self.w, derived["rotation"], self.block_size, 1)

    def materialize(self):
        return self.acting(rotation=self._rotation(self.skew)).materialize()

    def _rotation(self, skew):
        b = self.block_size
        blocks = cayley_rotations(skew, b, self.neumann_terms)
        return jnp.broadcast_to(blocks, (self.n_blocks, b, b)).reshape(-1, b)


def cayley_rotations(
    skew: jax.Array, block_size: int, neumann_terms: int | None = None
) -> jax.Array:
    """The transposes of the Cayley transforms (I + Q) (I - Q)^-1 of skew-symmetric matrices Q.

    Args:
      skew: The entries above the diagonal of each Q, row by row (..., b (b - 1) / 2).
      block_size: b, the size of each Q.
      neumann_terms: The inverse is approximated by the Neumann series I + Q + ... + Q^terms.
        `None` computes it exactly.

    Returns:
      The transposed rotations (..., b, b), in float32 or wider.
    """
    upper = np.triu_indices(block_size, 1)
    index = np.zeros((block_size, block_size), int)
    index[upper] = np.arange(len(upper[0]))
    sign = np.zeros((block_size, block_size), int)
    sign[upper] = 1
    wide = skew.astype(jnp.promote_types(skew.dtype, jnp.float32))
    q = wide[..., index + index.T] * (sign - sign.T).astype(wide.dtype)
    # R.T = (I + Q)^-1 (I - Q), because Q.T is -Q and the two factors commute.
    identity = jnp.eye(block_size, dtype=wide.dtype)
    if neumann_terms is None:
        return jnp.linalg.solve(identity + q, identity - q)
    inverse = identity
    with jax.default_matmul_precision("highest"):
        for _ in range(neumann_terms):
            inverse = identity - q @ inverse
        return inverse - q @ inverse


@register_method
def oft(
    block_size: int | Mapping[str, int],
    sites: Sites,
    *,
    block_share: bool = False,
    neumann_terms: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Orthogonal finetuning: rotates the inputs and keeps all angles between columns.

    Each selected matrix `w` (in, out) becomes

        R @ w,    R = blockdiag(R_1, R_2, ...),    R_k = (I + Q_k) (I - Q_k)^-1

    where the rotations R_k (b, b) are Cayley transforms of trainable skew-symmetric matrices Q_k
    (b, b), which start at zero, so that training starts at the base model. R is computed once per
    call, in O(in * b^2) operations. A product is computed as (x @ R) @ w, which takes in * b more
    multiplications per token than the base product.

    Args:
      block_size: b, the number of inputs in a block, which divides `in`. A mapping from path
        patterns to sizes gives each matrix its own; the first pattern that matches wins.
      sites: The matrices to adapt, with all of their outputs. They should be linear weights: in a
        convolution or a lookup, the weight is materialized, with a warning.
      block_share: Whether all blocks of a matrix share one Q.
      neumann_terms: `None` computes the inverse exactly, so that R is orthogonal up to rounding.
        A number approximates it by the Neumann series I + Q + ... + Q^neumann_terms, which needs
        products only, and R is orthogonal up to O(|Q|^(neumann_terms + 1)). The setting of 5 terms
        in Hugging Face PEFT is `neumann_terms=3` here.
      dtype: Dtype of the trainable entries of Q. R is computed in float32 or wider.

    Returns:
      A `Method` with in * (b - 1) / 2 trainable parameters per matrix, or b * (b - 1) / 2 with
      `block_share`.

    Raises:
      ValueError: A block size does not divide the inputs of a weight (the message names the weight
        and sizes that do), a slice of the outputs is selected, or `neumann_terms` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.oft(4, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/skew': (2, 6)}

    References:
      Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, section 3.
      https://arxiv.org/abs/2306.07280
      Qiu et al., Orthogonal Finetuning Made Scalable, 2025 (rotated inputs instead of rotated
      weights, and the Neumann series). https://arxiv.org/abs/2506.19847
    """
    if neumann_terms is not None and neumann_terms < 1:
        raise ValueError(
            f"`oft(neumann_terms={neumann_terms})`: give 1 or more, or None for the exact inverse."
        )
    sizes = by_pattern(block_size, sites, "block_size")
    check_whole("oft", sites)
    for path, site in sites.items():
        check_blocks("oft", "block_size", sizes[path], site)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        b = sizes[site.path]
        n_blocks = site.size(IN) // b
        shape = (*site.stack, 1 if block_share else n_blocks, b * (b - 1) // 2)
        skew = Trainable(jnp.zeros(shape, dtype))
        weight = CayleyRotation(view.weight, skew, b, n_blocks, block_share, neumann_terms)
        return dataclasses.replace(view, weight=weight)

    options = dict(
        block_size=block_size,
        sites=sites,
        block_share=block_share,
        neumann_terms=neumann_terms,
        dtype=dtype,
    )
    return Method(
        "oft", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="oft")
    )


def as_sharded(f: Callable[..., jax.Array], w: jax.Array, *others: jax.Array) -> jax.Array:
    """f(w, *others), with the sharding of w if shardings are part of the types.

    Args:
      f: A function to an array of w's shape. The compiler chooses the shardings inside it.
      w: A matrix.
      others: The other arguments of f.
    """
    sharding = compat.typed_sharding(jax.typeof(w))
    if sharding is None:
        return f(w, *others)
    return jax.sharding.auto_axes(f, out_sharding=sharding)(w, *others)


def check_blocks(
    caller: str, name: str, size: int, site: Site, side: str = IN, doublings: int = 0
) -> None:
    """Raises ValueError if blocks do not divide a side of a weight; lists sizes that do.

    Args:
      caller, name: The method and the option, for the message.
      size: Number of entries in a block.
      site, side: The weight, and its side "in" or "out".
      doublings: How often pairs of blocks are joined. If at all, each block has two halves.
    """
    total, joined = site.size(side), 2**doublings

    def fits(n: int) -> bool:
        return n >= 2 and total % (n * joined) == 0 and not (doublings and n % 2)

    if fits(size):
        return
    nearest = sorted(
        filter(fits, range(2, total + 1)), key=lambda n: abs(math.log(n / max(size, 1)))
    )
    fitting = ", ".join(map(str, sorted(nearest[:8]))) or "none"
    rule = f"an even number, {joined} times which divides" if doublings else "a number that divides"
    raise ValueError(
        f"`{caller}({name}={size})`: '{site.path}' of shape {site.shape} has {total} {side}puts. "
        f"Choose {rule} {total}, such as {fitting}; or leave this weight out of the sites."
    )
