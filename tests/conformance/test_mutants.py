"""The laws catch broken rules: each rule file is broken by hand in three or more ways.

A mutant is a rule file with one fragment replaced. Its rules take the place of the real ones for
one test, and the law of one row has to fail.
"""

import dataclasses
import functools
import pathlib
import types

import jax
import pytest

from jaxpeft._rules import contractions, control, gathers, scaling, sharding, views
from jaxpeft._rules.registry import RULES

from .methods import METHODS
from .rows import ROWS
from .subject import differentiated, expected_call, lifted_call, scores, subject, worst


@dataclasses.dataclass(frozen=True)
class Mutant:
    what: str
    module: types.ModuleType
    old: str
    new: str
    row: str  # the row on which the law fails
    method: str = "lora"


MUTANTS = [
    # contractions
    Mutant(
        "swapped axes: a transposed use taken for a forward one",
        contractions,
        "return x @ w if orientation == (IN, OUT) else x @ w.T",
        "return x @ w",
        "a weight and its transpose in one layer",
    ),
    Mutant(
        "swapped axes: outputs of a weight that comes first left where they are",
        contractions,
        "[*range(batch), *range(batch + x_free, y.ndim), *range(batch, batch + x_free)],",
        "[*range(y.ndim)],",
        "tensordot with the weight first",
    ),
    Mutant(
        "wrong batch axis: experts in another order",
        contractions,
        "permute(op.array, order),\n            self.groups,",
        "permute(op.array, order),\n            self.groups[::-1],",
        "experts by ragged_dot",
    ),
    Mutant(
        "dropped scale: the columns of one expert for all",
        contractions,
        "return jnp.repeat(op.array, self.groups, axis=0, total_repeat_length=self.tokens)",
        "return jnp.repeat(op.array[:1], self.tokens, axis=0)",
        "experts by ragged_dot",
        "ia3",
    ),
    Mutant(
        "dropped dilation of a kernel",
        contractions,
        'rhs_dilation=self.params["rhs_dilation"],',
        "rhs_dilation=None,",
        "convolution, NCHW, strided and dilated",
    ),
    # control flow
    Mutant(
        "layers from first to last where the model goes from last to first",
        control,
        'reverse=eqn.params["reverse"],',
        "reverse=False,",
        "lax.scan, reversed and unrolled",
    ),
    Mutant(
        "wrong batch axis: layers cut along the first axis",
        control,
        "leaf if at in (0, None) else jnp.moveaxis(leaf, at, 0)",
        "leaf",
        "linen nn.scan over axis 1",
    ),
    Mutant(
        "branches in another order",
        control,
        "[evaluated(branch) for branch in branches]",
        "[evaluated(branch) for branch in branches[::-1]]",
        "cond",
    ),
    Mutant(
        "dropped scale: the model's own derivative ignored",
        control,
        "grads.append(_pull_back(x, ct) if is_view(x) else ct)",
        "grads.append(_pull_back(x, 2 * ct) if is_view(x) else ct)",
        "custom_vjp that halves the gradient",
    ),
    # gathers
    Mutant(
        "ids out of range read the last row",
        gathers,
        "y = jnp.where(valid[..., None], y, jnp.nan if fill is None else fill)",
        "pass",
        "take, filled",
    ),
    Mutant(
        "the last row cannot be read",
        gathers,
        "jnp.clip(ids, 0, count - 1)",
        "jnp.clip(ids, 0, count - 2)",
        "table[ids]",
    ),
    Mutant(
        "swapped axes: rows left behind the ids",
        gathers,
        "return [permute(y, place)]",
        "return [y]",
        "take along the last axis",
    ),
    # views
    Mutant(
        "every part is the first part",
        views,
        "first, last = start // unit, stop // unit",
        "first, last = 0, (stop - start) // unit",
        "weight split into parts before use",
    ),
    Mutant(
        "wrong batch axis: every slice is the first slice",
        views,
        "selected = _select(view, dim, start) if",
        "selected = _select(view, dim, 0) if",
        "two weights stacked in one array",
    ),
    Mutant(
        "swapped axes: a transpose that does nothing",
        views,
        "view.redim(after_layout(eqn, view.dims))",
        "view if eqn.primitive is p.transpose_p else view.redim(after_layout(eqn, view.dims))",
        "a weight and its transpose in one layer",
    ),
    # sharding
    Mutant(
        "swapped axes: devices along the other axis",
        sharding,
        "by_axis[lead[0].axis] = names",
        "by_axis[len(view.axes) - 1 - lead[0].axis] = names",
        "shard_map, column- then row-parallel",
    ),
    Mutant(
        "fields whole on every device",
        sharding,
        "next((by_axis[i] for i in run if i in by_axis), None)",
        "None",
        "shard_map, column- then row-parallel",
    ),
    Mutant(
        "a device's part taken for the whole weight",
        sharding,
        "return Shards(whole.size // _parts(mesh, names), whole.role, names)",
        "return Shards(whole.size, whole.role, names)",
        "shard_map, column- then row-parallel",
    ),
    Mutant(
        "every device takes its own part of a field for the others'",
        sharding,
        "lax.all_gather(leaves[i], names, axis=at, tiled=True)",
        "jax.numpy.concatenate([leaves[i]] * params['axis_size'], axis=at)",
        "shard_map, weights gathered by each device before use",
    ),
    # numbers
    Mutant(
        "dropped scale: a weight times a scalar without the scalar",
        scaling,
        "return self._times(x @ self.w)",
        "return x @ self.w",
        "a weight times a number",
    ),
    Mutant(
        "a division taken for a product",
        scaling,
        "_times(a, b, divides=True)",
        "_times(a, b)",
        "a weight times a number",
    ),
    Mutant(
        "a sign dropped",
        scaling,
        "jnp.asarray(-1, view.dtype)",
        "jnp.asarray(1, view.dtype)",
        "a weight times a number",
    ),
]


@functools.lru_cache(maxsize=1)
def reference(s):
    f, variables = scores(s, s.case.fn, s.case.args, expected_call(s), keep=True)
    return variables, jax.jit(differentiated(s, f, keep=True))(variables)


def law_holds(s) -> bool:
    """Whether the lifted row has the outputs, dtypes and gradients of the merged one."""
    variables, wanted = reference(s)
    f, _ = scores(s, s.case.fn, s.case.args, lifted_call(s), keep=True)
    try:
        found = jax.jit(differentiated(s, f, keep=True))(variables)
        return worst(found, wanted) <= s.row.tolerance * 10
    except Exception:  # a mutant may well end in a shape error of JAX
        return False


def load(module, source):
    """The rules of a rule file with this source, in the place of the real ones."""
    broken = types.ModuleType(module.__name__)
    real = dict(RULES)
    exec(compile(source, f"<broken {module.__name__}>", "exec"), broken.__dict__)
    # A rule that a later file has replaced stays replaced.
    RULES.update({p: f for p, f in real.items() if f.__module__ != module.__name__})


@pytest.fixture
def rules():
    """Puts the real rules back."""
    real = dict(RULES)
    yield
    RULES.clear()
    RULES.update(real)


@pytest.mark.parametrize(
    "mutant", MUTANTS, ids=[f"{m.module.__name__.split('.')[-1]}: {m.what}" for m in MUTANTS]
)
@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_a_broken_rule_is_caught(mutant, rules):
    row = next(r for r in ROWS if r.name == mutant.row)
    s = subject(row, next(m for m in METHODS if m.name == mutant.method))
    source = pathlib.Path(mutant.module.__file__).read_text()
    assert source.count(mutant.old) == 1, "the file has changed: break it in a new way"
    load(mutant.module, source)
    assert law_holds(s), "the law fails before the file is broken"
    load(mutant.module, source.replace(mutant.old, mutant.new))
    assert not law_holds(s)
