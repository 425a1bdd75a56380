"""What methods are written with, for those who write their own.

A method needs two things: a `jaxpeft.Weight` that says what happens in the place of a matrix, and
a function that puts it into a tree and returns a `jaxpeft.Method`.

The weight is a class with the decorator `weight`. Its fields are declared by `base_weight` (the
array or weight that it acts on), `axes` (an array, with the names of its axes), `arrays` (any tree
of arrays) and `static` (part of the program). Its methods say what the three uses of a matrix
become: `forward`, `transposed` and `lookup`; `materialize` gives the dense matrix, if there is one.

The function calls `apply_to_sites`, which visits every selected parameter. What is trained is
wrapped in `jaxpeft.Trainable`. Stacks of layers, experts, convolutions, any order of axes,
quantized bases, `split`, `combine`, `lift` and `merge` work without further code.

Example:
  A learned scale of every output of a matrix, which starts at 1.

  >>> import dataclasses, jax, jax.numpy as jnp, jaxpeft as jp
  >>> from typing import Any
  >>> from jaxpeft.extend import (
  ...     apply_to_sites, axes, base_weight, dense, register_method, weight)

  >>> @weight
  ... class OutputScale(jp.Weight):
  ...     '''The matrix `w * (1 + s)`.'''
  ...     w: Any = base_weight()
  ...     s: Any = axes("out")
  ...     local_in = local_out = True  # each device may scale its part of the outputs
  ...     def forward(self, x):
  ...         y = x @ self.w
  ...         return y + y * self.s
  ...     def transposed(self, y):
  ...         return (y + y * self.s) @ self.w.T
  ...     def lookup(self, ids):
  ...         rows = self.w[ids]
  ...         return rows + rows * self.s
  ...     def materialize(self):
  ...         return dense(self.w) * (1 + self.s)

  >>> @register_method
  ... def output_scale(sites: jp.Sites, *, dtype: Any = jnp.float32) -> jp.Method:
  ...     '''Scales every output of the selected matrices.'''
  ...     def make(key, site, view):
  ...         s = jp.Trainable(jnp.zeros((*site.stack, site.size("out")), dtype))
  ...         return dataclasses.replace(view, weight=OutputScale(view.weight, s))
  ...     def apply(key, tree):
  ...         return apply_to_sites(key, tree, sites, make, caller="output_scale")
  ...     return jp.Method("output_scale", {"sites": sites, "dtype": dtype}, apply)

  It is used as any other method is. It trains:

  >>> model = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
  >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
  >>> x = jnp.ones((3, 4))
  >>> method = output_scale(jp.sites(model, params, x).linear)
  >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
  >>> {path: array.shape for path, array in adapter.items()}
  {'down/s': (2,), 'up/s': (8,)}
  >>> def loss(adapter):
  ...     y = jp.lift(model)(jp.combine(frozen, adapter), x)
  ...     return jnp.mean((y - 16) ** 2)
  >>> trained = jax.tree.map(lambda p, g: p - 1e-4 * g, adapter, jax.grad(loss)(adapter))
  >>> bool(loss(trained) < loss(adapter))
  True

  And it merges into plain arrays:

  >>> tree = jp.combine(frozen, trained)
  >>> bool(jnp.allclose(model(jp.merge(tree), x), jp.lift(model)(tree, x)))
  True

  Since it is registered, `io.save_adapter` and `io.load_adapter` take it, as long as the module
  that defines it has been imported.
"""

from jaxpeft._method import register_method, takes_sites
from jaxpeft._operand import CallSite, Operand
from jaxpeft._sites import by_pattern
from jaxpeft._view import Axis
from jaxpeft._weight import (
    IN,
    OUT,
    STACK,
    PositionsError,
    Unsupported,
    arrays,
    axes,
    base_weight,
    dense,
    static,
    weight,
)
from jaxpeft.extend._apply import (
    apply_to_sites,
    bias_of,
    check_any,
    check_entries,
    check_floating,
    check_rank,
    check_whole,
)
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped

__all__ = [
    "Axis",
    "CallSite",
    "IN",
    "OUT",
    "Operand",
    "PositionsError",
    "STACK",
    "Unsupported",
    "apply_to_sites",
    "arrays",
    "axes",
    "base_weight",
    "bias_of",
    "by_pattern",
    "check_any",
    "check_entries",
    "check_floating",
    "check_rank",
    "check_rate",
    "check_whole",
    "dense",
    "dropout_key",
    "dropped",
    "register_method",
    "static",
    "takes_sites",
    "weight",
]
