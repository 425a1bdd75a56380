"""An optimizer's update in independent stages, which bring paged arrays to the device in turn.

The update is traced once. Its jaxpr is divided by the paged arrays that each equation depends on,
and evaluated stage by stage, with barriers that make a stage wait for an earlier one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend.core.primitives import jit_p

from jaxpeft import _compat as compat
from jaxpeft.optim._finite import stays_finite


def staged_update(
    update: Callable,
    updates: Any,
    state: Any,
    params: Any,
    on_host: Any,
    unless: jax.Array | None = None,
    max_in_flight: int = 1,
) -> tuple[Any, Any]:
    """`update(updates, state, params)`, with the paged leaves of the state fetched stage by stage.

    Two paged leaves are in the same stage if an equation depends on both. Equations that depend
    on no paged leaf are in no stage: XLA schedules them.

    Args:
      update: `(updates, state, params) -> (updates, state)`, traced once.
      updates, state, params: Its arguments; the paged leaves of `state` in host memory.
      on_host: Tree of bools in the structure of `state`, true for paged leaves.
      unless: bool[]. Where it is true, the updates are zeros and the state stays. If given, a
        stage whose new state would not be finite keeps the old one, and returns updates of NaN.
        `None` never skips.
      max_in_flight: Number of stages that may be on the device at once.

    Returns:
      The results of `update`, with the paged leaves of the new state in host memory.

    Raises:
      ValueError: The new state has another structure, or other shapes or dtypes, than the old.
    """
    args = (updates, state, params)
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*jax.tree.map(_on_device, args))
    _check_same_form(state, shapes[1])
    program = _inlined(closed)

    old_leaves = jax.tree.leaves(state)
    begin = len(jax.tree.leaves(updates))
    old = program.inputs[begin : begin + len(old_leaves)]
    new = program.outputs[len(program.outputs) - len(old) :]
    # Index among the leaves of the state: the paged leaf, in host memory.
    paged = {i: old_leaves[i] for i, x in enumerate(jax.tree.leaves(on_host)) if x}
    stages = _Stages(program.calls, [old[i] for i in paged])
    for i in paged:
        stages.join([old[i], new[i]])

    known = dict(program.known) | dict(zip(program.inputs, jax.tree.leaves(args), strict=True))

    def value(number):
        return number.val if isinstance(number, jex.Literal) else known[number]

    def run(calls):
        for call in calls:
            results = compat.bind(call.eqn, [value(i) for i in call.inputs])
            known.update(zip(call.outputs, results, strict=True))

    def kept(position, leaf):
        return leaf if unless is None else jnp.where(unless, known[old[position]], leaf)

    run(call for call in program.calls if stages.of(call.inputs) is None)
    done: list[list[int]] = []
    for stage in dict.fromkeys(stages.of([old[i]]) for i in paged):
        mine = [i for i in paged if stages.of([old[i]]) == stage]
        changed = [i for i in mine if new[i] is not old[i]]
        calls = [call for call in program.calls if stages.of(call.inputs) == stage]
        if not calls and not changed:
            continue
        if len(done) >= max_in_flight:
            # This stage is fetched only after an earlier one is back in host memory.
            now = [*mine, *done[-max_in_flight]]
            paged.update(
                zip(now, jax.lax.optimization_barrier([paged[i] for i in now]), strict=True)
            )
        fetched = jax.device_put([paged[i] for i in mine], jax.memory.Space.Device)
        known.update(zip([old[i] for i in mine], fetched, strict=True))
        run(calls)
        # The updates of a stage are computed before it goes back: otherwise XLA would compute all
        # updates at the end, and keep everything that was fetched until then.
        made = {number for call in calls for number in call.outputs}
        own = [x for x in program.outputs[: len(program.outputs) - len(old)] if x in made]
        leaves = [kept(i, value(new[i])) for i in changed]
        # Without a barrier, XLA may fuse the guard with the arithmetic and round differently.
        own_values, leaves = jax.lax.optimization_barrier(([known[x] for x in own], leaves))
        if unless is not None and changed:
            before = [known[old[i]] for i in changed]
            finite = stays_finite(before, leaves)
            leaves = [jnp.where(finite, n, o) for n, o in zip(leaves, before, strict=True)]
            own_values = [jnp.where(finite, x, jnp.nan).astype(x.dtype) for x in own_values]
            own_values, leaves = jax.lax.optimization_barrier((own_values, leaves))
        known.update(zip(own, own_values, strict=True))
        paged.update(zip(changed, jax.device_put(leaves, jax.memory.Space.Host), strict=True))
        done.append(mine)

    def unless_zero(update):
        # -0.0 + 0.0 is 0.0 and -0.0 + -0.0 is -0.0, so adding -0.0 changes no parameter.
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
    """A jaxpr on numbered values, with the jits in it inlined."""

    calls: list[_Call]
    inputs: list[int]
    known: list[tuple[int, Any]]  # constants
    outputs: list[Any]  # numbers, or literals


def _inlined(closed):
    """The jaxpr with numbers for variables, since two calls of a jit share its variables."""
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


class _Stages:
    """Disjoint sets of paged arrays (union-find); the name of a set is one of its arrays."""

    def __init__(self, calls: list[_Call], paged: list[int]):
        self._parent = {i: i for i in paged}  # another array of its set; a name has itself
        self._source = {i: i for i in paged}  # value: a paged array that it depends on
        for call in calls:
            self.join(call.inputs)
            name = self.of(call.inputs)
            if name is not None:
                self._source |= dict.fromkeys(call.outputs, name)

    def of(self, values: list[Any]) -> int | None:
        """The name of the stage of these values, which are of one stage at most, or `None`."""
        names = self._names(values)
        return names[0] if names else None

    def join(self, values: list[Any]) -> None:
        first, *others = self._names(values) or [None]
        for other in others:
            self._parent[other] = first

    def _names(self, values):
        sources = (self._source.get(x) for x in values if isinstance(x, int))
        return list(dict.fromkeys(self._name(i) for i in sources if i is not None))

    def _name(self, i):
        while self._parent[i] != i:
            i = self._parent[i]
        return i


def _on_device(x):
    """The type of the array when it is on the device."""
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=compat.typed_sharding(aval)
    )


def _check_same_form(old, new):
    def kinds(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

    before, after = kinds(jax.tree.map(jax.typeof, old)), kinds(new)
    for path in [*before, *after]:
        was, is_now = before.get(path, "nothing"), after.get(path, "nothing")
        if was != is_now:
            raise ValueError(
                "`paged` needs an optimizer whose state keeps its structure, shapes and dtypes; "
                f"at {path} it was {was} before the update and is {is_now} after it. Use the "
                "optimizer without `paged`."
            )
