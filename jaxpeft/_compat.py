"""What the core reads from JAX's programs and types, kept apart from how a version writes it.

The supported versions name and arrange some of this differently: parameters of a scan, constants
of a jaxpr, primitives. Each function here has one source for all of them and asks for no version
number. Primitives that `jax.extend.core.primitives` does not export are found by tracing one
public call, so that neither their names nor their modules matter.
"""

import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.extend.source_info_util import summarize
from jax.sharding import AxisType, PartitionSpec


def _primitive(fn: Callable, *args: Any) -> jex.Primitive:
    """The last primitive that a public function binds."""
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns[-1].primitive


_f = jax.ShapeDtypeStruct((2, 2), jnp.float32)

_debug_info = jex.DebugInfo("jaxpeft", "lift", None, None)

ragged_dot_p = _primitive(
    lax.ragged_dot,
    _f,
    jax.ShapeDtypeStruct((1, 2, 2), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
)
split_p = _primitive(lambda x: lax.split(x, (1, 1)), _f)
stack_p = _primitive(lambda x: jnp.stack([x, x]), _f)
tile_p = _primitive(lambda x: jnp.tile(x, (2, 1)), _f)
optimization_barrier_p = _primitive(lax.optimization_barrier, _f)


def _under_shard_map() -> tuple[jex.Primitive, jex.Primitive | None]:
    """The primitives of `jax.shard_map` and of `lax.pcast` to varying inside it."""
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def body(x: jax.Array) -> jax.Array:
        return lax.pcast(x, ("x",), to="varying")

    spec = PartitionSpec()
    closed = jax.make_jaxpr(
        jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("x"))
    )(_f)
    eqn = closed.jaxpr.eqns[-1]
    inner, _ = open_jaxpr(eqn.params["jaxpr"])
    return eqn.primitive, inner.eqns[-1].primitive if inner.eqns else None


def open_jaxpr(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> tuple[jex.Jaxpr, list[Any]]:
    """A jaxpr and its constants; closed jaxprs and open ones look alike afterwards."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))  # type: ignore


def aval(v: jex.Var | jex.Literal) -> jax.core.ShapedArray:
    """The type of an array's variable, of which JAX's own annotation says only that it is one."""
    return v.aval  # type: ignore[return-value]


def shape_of(v: jex.Var | jex.Literal) -> tuple[int, ...]:
    """The shape of a variable, () where it holds no array."""
    return getattr(v.aval, "shape", ())


shard_map_p, pcast_p = _under_shard_map()


def bind(eqn: jex.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on arrays, as JAX would.

    A jaxpr of this one equation keeps its named scope, source line, context and effects.
    """
    operands: dict[Any, Any] = {
        v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, jex.Literal)
    }
    one = jex.Jaxpr((), list(operands), eqn.outvars, [eqn], eqn.effects, _debug_info)
    return jax.core.eval_jaxpr(one, (), *operands.values())


def scan_counts(eqn: jex.JaxprEqn) -> tuple[int, int, int]:
    """How many operands of a scan are constants, are carried, and are scanned over.

    The ranks tell them apart, since the parameters that say so differ between versions.
    """
    body, _ = open_jaxpr(eqn.params["jaxpr"])
    ranks = [
        aval(outer).ndim - aval(inner).ndim
        for outer, inner in zip(eqn.invars, body.invars, strict=True)
    ]
    xs = sum(ranks)
    carry = sum(
        aval(outer).ndim == aval(inner).ndim
        for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    return len(eqn.invars) - carry - xs, carry, xs


def source(eqn: jex.JaxprEqn) -> str:
    """`file:line (function)` of the user's code that made this equation."""
    return summarize(eqn.source_info)


#: What JAX raises where a program needs the concrete value of a traced array.
CONCRETIZATION_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def line_of(error: BaseException) -> str:
    """`file:line (function)` of a traceback's last frame outside of JAX and of this library."""
    libraries = tuple(os.path.dirname(file) + os.sep for file in (jax.__file__ or "", __file__))
    frames = traceback.extract_tb(error.__traceback__)
    last = [f for f in frames if not f.filename.startswith(libraries)][-1]
    return f"{last.filename}:{last.lineno} ({last.name})"


def typed_sharding(aval: Any) -> jax.NamedSharding | None:
    """The sharding of a type on a mesh with Explicit axes, else `None`."""
    sharding = getattr(aval, "sharding", None)
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if AxisType.Explicit in kinds else None


def varying(x: Any) -> frozenset[str]:
    """The mesh axes that a value varies over inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The type of an array as a tracing argument, with its sharding where that is typed.

    The mesh axes that a value varies over inside `shard_map` are left out: JAX inserts the
    casts where the trace needs them, and `lift` skips those that the real value has already.
    """
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=typed_sharding(aval))
