"""An optimizer's update, cut into pieces that need nothing of each other.

The update is traced once, its jaxpr sorted by the paged arrays on which each equation depends, and
evaluated piece by piece, with barriers that make a piece wait for an earlier one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend.core.primitives import jit_p

from jaxpeft import _compat as compat
from jaxpeft.optim._finite import stays_finite


def in_pieces(
    update: Callable,
    updates: Any,
    state: Any,
    params: Any,
    on_host: Any,
    unless: jax.Array | None = None,
    in_flight: int = 1,
) -> tuple[Any, Any]:
    """`update(updates, state, params)` with paged leaves of the state fetched in turn.

    Two paged leaves are in one piece where an equation depends on both. What depends on none is
    no piece's: XLA computes it when it is needed.

    Args:
      update: `(updates, state, params) -> (updates, state)`, traced once.
      updates, state, params: Its arguments; the paged leaves of `state` in host memory.
      on_host: Tree of bools like `state`: which leaves are paged.
      unless: bool[]; where true the updates are zeros and the state stays. `None`: never. With
        it, a piece whose state would no longer be finite keeps it, and makes updates of NaN.
      in_flight: How many pieces may be on the device at once.
    Returns:
      What `update` returns, the paged leaves of the new state in host memory.
    Raises:
      ValueError: where the new state has another structure or other shapes than the old.
    """
    args = (updates, state, params)
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*jax.tree.map(_on_device, args))
    _check_alike(state, shapes[1])
    program = _written_out(closed)

    old_leaves = jax.tree.leaves(state)
    begin = len(jax.tree.leaves(updates))
    old = program.inputs[begin : begin + len(old_leaves)]
    new = program.outputs[len(program.outputs) - len(old) :]
    # Position among the state's leaves: the paged leaf, on the host.
    paged = {i: old_leaves[i] for i, x in enumerate(jax.tree.leaves(on_host)) if x}
    pieces = _Pieces(program.calls, [old[i] for i in paged])
    for i in paged:
        pieces.join([old[i], new[i]])

    known = dict(program.known) | dict(zip(program.inputs, jax.tree.leaves(args), strict=True))

    def value(number):
        return number.val if isinstance(number, jex.Literal) else known[number]

    def run(calls):
        for call in calls:
            results = compat.bind(call.eqn, [value(i) for i in call.inputs])
            known.update(zip(call.outputs, results, strict=True))

    def kept(position, leaf):
        return leaf if unless is None else jnp.where(unless, known[old[position]], leaf)

    run(call for call in program.calls if pieces.of(call.inputs) is None)
    done: list[list[int]] = []
    for piece in dict.fromkeys(pieces.of([old[i]]) for i in paged):
        mine = [i for i in paged if pieces.of([old[i]]) == piece]
        changed = [i for i in mine if new[i] is not old[i]]
        calls = [call for call in program.calls if pieces.of(call.inputs) == piece]
        if not calls and not changed:
            continue
        if len(done) >= in_flight:
            # On the device only after the earlier piece is back on the host.
            now = [*mine, *done[-in_flight]]
            paged.update(
                zip(now, jax.lax.optimization_barrier([paged[i] for i in now]), strict=True)
            )
        fetched = jax.device_put([paged[i] for i in mine], jax.memory.Space.Device)
        known.update(zip([old[i] for i in mine], fetched, strict=True))
        run(calls)
        # What the piece has fetched is done with when it goes: XLA would compute the updates at
        # the end, and keep all that was fetched until then.
        made = {number for call in calls for number in call.outputs}
        own = [x for x in program.outputs[: len(program.outputs) - len(old)] if x in made]
        leaves = [kept(i, value(new[i])) for i in changed]
        # A guard that is fused with the arithmetic may round it another way.
        own_values, leaves = jax.lax.optimization_barrier(([known[x] for x in own], leaves))
        if unless is not None and changed:
            before = [known[old[i]] for i in changed]
            good = stays_finite(before, leaves)
            leaves = [jnp.where(good, n, o) for n, o in zip(leaves, before, strict=True)]
            own_values = [jnp.where(good, x, jnp.nan).astype(x.dtype) for x in own_values]
            own_values, leaves = jax.lax.optimization_barrier((own_values, leaves))
        known.update(zip(own, own_values, strict=True))
        paged.update(zip(changed, jax.device_put(leaves, jax.memory.Space.Host), strict=True))
        done.append(mine)

    def unless_zero(update):
        # The zero whose sum with 0.0 and with -0.0 is what it was.
        zero = jnp.asarray(-0.0, jnp.result_type(update))
        return update if unless is None else jnp.where(unless, zero, update)

    out = [unless_zero(value(x)) for x in program.outputs[: len(program.outputs) - len(old)]]
    out += [paged[i] if i in paged else kept(i, value(new[i])) for i in range(len(old))]
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


class _Call(NamedTuple):
    """An equation on numbered values."""

    eqn: jex.JaxprEqn
    inputs: list[Any]  # numbers, or literals
    outputs: list[int]


class _Program(NamedTuple):
    """A jaxpr on numbered values, the jits in it written out."""

    calls: list[_Call]
    inputs: list[int]
    known: list[tuple[int, Any]]  # constants
    outputs: list[Any]  # numbers, or literals


def _written_out(closed):
    """Numbers instead of variables, since a jit that is called twice has its variables once."""
    calls: list[_Call] = []
    known: list[tuple[int, Any]] = []
    last = 0

    def numbers(variables):
        nonlocal last
        last += len(variables)
        return list(range(last - len(variables), last))

    def write(jaxpr, constants, inputs):
        number = dict(zip(jaxpr.invars, inputs, strict=True))
        own = numbers(jaxpr.constvars)
        number.update(zip(jaxpr.constvars, own, strict=True))
        known.extend(zip(own, constants, strict=True))

        def read(atoms):
            return [x if isinstance(x, jex.Literal) else number[x] for x in atoms]

        for eqn in jaxpr.eqns:
            given = read(eqn.invars)
            if eqn.primitive is jit_p:
                outputs = write(*compat.open_jaxpr(eqn.params["jaxpr"]), given)
            else:
                outputs = numbers(eqn.outvars)
                calls.append(_Call(eqn, given, outputs))
            number.update(zip(eqn.outvars, outputs, strict=True))
        return read(jaxpr.outvars)

    jaxpr, constants = compat.open_jaxpr(closed)
    inputs = numbers(jaxpr.invars)
    return _Program(calls, inputs, known, write(jaxpr, constants, inputs))


class _Pieces:
    """Disjoint sets of paged arrays, those that meet in one; a set's name is one of them."""

    def __init__(self, calls: list[_Call], paged: list[int]):
        self._toward = {i: i for i in paged}  # a paged array that it has met; the name: itself
        self._source = {i: i for i in paged}  # value: one of the paged arrays that it depends on
        for call in calls:
            self.join(call.inputs)
            name = self.of(call.inputs)
            if name is not None:
                self._source |= dict.fromkeys(call.outputs, name)

    def of(self, values: list[Any]) -> int | None:
        """The piece that these values, never of two pieces, belong to, if to any."""
        names = self._names(values)
        return names[0] if names else None

    def join(self, values: list[Any]) -> None:
        first, *others = self._names(values) or [None]
        for other in others:
            self._toward[other] = first

    def _names(self, values):
        sources = (self._source.get(x) for x in values if isinstance(x, int))
        return list(dict.fromkeys(self._name(i) for i in sources if i is not None))

    def _name(self, i):
        while self._toward[i] != i:
            i = self._toward[i]
        return i


def _on_device(x):
    """The type of an array, were it on the device."""
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=compat.typed_sharding(aval)
    )


def _check_alike(old, new):
    def kinds(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

    before, after = kinds(jax.tree.map(jax.typeof, old)), kinds(new)
    for path in [*before, *after]:
        was, is_now = before.get(path, "nothing"), after.get(path, "nothing")
        if was != is_now:
            raise ValueError(
                f"`paged` needs an optimizer whose state keeps its form; at {path} it was {was} "
                f"before the update and is {is_now} after it."
            )
