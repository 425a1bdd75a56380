"""The first mistakes of a new user, each with what the error says about the way out."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.optim import lora_plus

KEY = jax.random.key(0)
P = {"w": jnp.ones((6, 8)), "b": jnp.ones(8), "v": jnp.ones((8, 3))}
X = jnp.ones((2, 6))


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


S = jp.sites(model, P, X)
MARKED = jp.chain(jp.lora(2, S.linear, dropout=0.5), jp.bitfit(S))(KEY, P)
FROZEN, ADAPTER = jp.split(MARKED)
TREE = jp.combine(FROZEN, ADAPTER)


def says(error, *parts):
    """That the error is raised, and its message has all of these in their order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


# Structured weights used as arrays ---------------------------------------------------------------

UNLIFTED = "parameter 'w', where a `LowRank` stands", "`jaxpeft.lift(fn)(tree, ...)`"
UNCOMBINED = "on 'w/a', a placeholder that nothing has filled yet", "combine(frozen, adapter)"
UNSPLIT = "array that `lora` trains at 'w'", "`frozen, adapter = jaxpeft.split(tree)`"

#: Each with a weight in the place of w.
OPERATIONS = {
    "x @ w": (lambda w: X @ w, "an operation of JAX"),
    "numpy x @ w": (lambda w: np.ones((2, 6)) @ w, "`@`"),
    "w + 1": (lambda w: w + 1, "`+`"),
    "1 - w": (lambda w: 1 - w, "`-`"),
    "-w": (lambda w: -w, "`-`"),
    "w[0]": (lambda w: w[0], "`[...]`"),
    "w < 1": (lambda w: w < 1, "`<`"),
    "iteration": (lambda w: list(w), "iteration"),
    "float(w)": (lambda w: float(w), "`float`"),
    "jnp.asarray": (lambda w: jnp.asarray(w), "an operation of JAX"),
    "jnp.dot": (lambda w: jnp.dot(X, w), "an operation of JAX"),
    "jnp.sum": (lambda w: jnp.sum(w), "an operation of JAX"),
    "jnp.einsum": (lambda w: jnp.einsum("ij,jk->ik", X, w), "an operation of JAX"),
    "np.asarray": (lambda w: np.asarray(w), "an operation of NumPy"),
    "under jit": (lambda w: jax.jit(lambda x: x @ w)(X), "an operation of JAX"),
}
ATTRIBUTES = ["T", "astype", "reshape", "at", "sum", "mean", "real"]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("tree, parts", [(TREE, UNLIFTED), (FROZEN, UNCOMBINED), (MARKED, UNSPLIT)])
def test_an_operation_on_a_structured_weight_says_what_was_forgotten(name, tree, parts):
    operation, what = OPERATIONS[name]
    with says(TypeError, what, *parts):
        operation(tree["w"])


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("tree", [FROZEN, MARKED])
def test_an_operation_on_the_place_of_an_array_says_what_was_forgotten(name, tree):
    operation, what = OPERATIONS[name]
    own = {id(FROZEN): ("'b'", "combine"), id(MARKED): ("`bitfit` trains at 'b'", "split")}
    with says(TypeError, what, *own[id(tree)]):
        operation(tree["b"])


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("tree, parts", [(TREE, UNLIFTED), (FROZEN, UNCOMBINED), (MARKED, UNSPLIT)])
def test_an_attribute_of_an_array_says_what_was_forgotten(name, tree, parts):
    with says(AttributeError, f"`.{name}`", *parts):
        getattr(tree["w"], name)


def test_an_attribute_of_nothing_is_an_ordinary_error():
    for x in (TREE["w"], FROZEN["b"], MARKED["b"]):
        with says(AttributeError, f"'{type(x).__name__}' object has no attribute 'wieght'"):
            x.wieght  # noqa: B018
        assert not hasattr(x, "__deepcopy__")


def test_the_last_layers_of_a_stack_are_no_array_either():
    def stacked(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    p = {"layers": jnp.ones((3, 6, 6))}
    tree = jp.last_layers(jp.sites(stacked, p, X), 1)(KEY, p)
    with says(
        TypeError, "an operation of JAX on an array that `last_layers` trains at 'layers'", "split"
    ):
        X @ tree["layers"]
    with says(
        TypeError, "an operation of JAX on 'layers/trained_part'", "combine(frozen, adapter)"
    ):
        X @ jp.split(tree)[0]["layers"]


def test_a_value_of_the_call_is_named_as_one():
    place = FROZEN["w"].weight.key
    with says(AttributeError, "`.shape` on 'dropout'", "combine(frozen, adapter, dropout=...)"):
        place.shape  # noqa: B018


# The steps are taken in another order ------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda f: f(FROZEN, X), lambda f: jax.jit(f)(FROZEN, X)])
def test_a_frozen_tree_is_not_lifted(call):
    with says(ValueError, "`lift` on 'b', a placeholder", "combine(frozen, adapter)"):
        call(jp.lift(model))
    # Nor is one whose weight the function does not use.
    with says(ValueError, "`lift` on 'b', a placeholder"):
        call(jp.lift(lambda p, x: x))


def test_a_tree_that_was_not_split_is_not_lifted():
    with says(ValueError, "`lift` on an array that `lora` trains at 'v'", "jaxpeft.split(tree)"):
        jp.lift(model)(jp.lora(2, S.linear)(KEY, P), X)


def test_nor_is_either_given_by_keyword():
    with says(ValueError, "`lift` on 'v/a', a place"):
        jp.lift(lambda x, p: model(p, x))(X, p=jp.split(jp.lora(2, S.linear)(KEY, P))[0])


@pytest.mark.parametrize("f", [jp.merge, jp.base_params])
def test_a_frozen_tree_has_no_dense_form(f):
    with says(ValueError, f"`{f.__name__}` on 'b', a placeholder", "combine"):
        f(jp.split(jp.bitfit(S)(KEY, P))[0])


def test_marks_are_not_merged():
    with says(ValueError, "`merge` on 'b', a place"):
        jp.merge(FROZEN)
    with says(ValueError, "`merge` on an array that `bitfit` trains at 'b'"):
        jp.merge(MARKED)


def test_a_tree_is_taken_apart_once():
    with says(
        ValueError, "taken apart already", "placeholders for ['b', 'v/a', 'v/b', 'w/a', 'w/b']"
    ):
        jp.split(FROZEN)
    with says(ValueError, "`combine` on an array that `bitfit` trains at 'b'", "split"):
        jp.combine(MARKED, ADAPTER)


def test_params_have_no_place_for_an_adapter():
    with says(
        KeyError, "['b', 'v/a', 'v/b', 'w/a', 'w/b'], and the tree has no placeholder at all"
    ):
        jp.combine(P, ADAPTER)


def test_arguments_of_combine_are_not_swapped():
    with says(KeyError, "['b', 'v', 'w'], is a tree with structured weights", "That comes first"):
        jp.combine(ADAPTER, FROZEN)
    with says(TypeError, "the adapter is a tuple"):
        jp.combine(FROZEN, (FROZEN, ADAPTER))


def test_the_function_is_lifted_and_not_its_result():
    with says(TypeError, "was given a ", "Array", "write `lift(fn)(tree, ...)`"):
        jp.lift(model(P, X))
    with says(TypeError, "the function comes first, and dict cannot be called"):
        jp.sites(P, model, X)


@pytest.mark.parametrize(
    "key, message",
    [(0, "was given int"), (jnp.float32(1), "was given float32 of shape ()"), (P, "given dict")],
)
def test_dropout_takes_a_key(key, message):
    with says(TypeError, "`combine(dropout=...)` needs a PRNG key", message):
        jp.combine(FROZEN, ADAPTER, dropout=key)


def test_keys_of_both_forms_are_taken():
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        jp.combine(FROZEN, ADAPTER, dropout=key)
        jp.lora(2, S.linear)(key, P)


# A method and its arguments --------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [jp.lora(2, S.linear), jp.chain(jp.bitfit(S)), jp.full_finetuning(S)]
)
def test_a_method_is_given_a_key_and_params(method):
    caller = f"`{method.name}(...)(key, params)`"
    with says(TypeError, caller, "the key comes first; it was given a dict and then a key"):
        method(P, KEY)
    with says(TypeError, caller, "it was given a dict alone"):
        method(P)
    with says(TypeError, caller, "needs a PRNG key", "was given int"):
        method(0, P)
    with says(TypeError, caller, "needs a PRNG key", "was given dict"):
        method(P, jax.random.PRNGKey(0))


@pytest.mark.parametrize(
    "value, way",
    [
        ("w", "(sites='w')`: give a selection of sites, not a str: `sites.match('w')`"),
        (["w", "v"], "not a list: `sites.match('w', 'v')`"),
        (S["w"], "not a Site: `sites.match('w')`"),
        (P, "not a dict: `sites.linear`"),
        (8, "(sites=8)`: give a selection of sites, not a int"),
    ],
)
@pytest.mark.parametrize(
    "factory",
    [
        lambda sites: jp.lora(2, sites),
        lambda sites: jp.quantize("int8", sites),
        lambda sites: jp.bitfit(sites),
        lambda sites: jp.gates(sites=sites),
        lambda sites: jp.sparsity.magnitude_scores(P, sites),
    ],
)
def test_a_selection_of_sites_is_no_path(factory, value, way):
    with says(TypeError, way, "`sites = jaxpeft.sites(fn, params, *inputs)`"):
        factory(value)


def test_every_factory_says_so():
    """All public functions that take sites, each argument of them by itself."""
    checked = 0
    for factory in [*(getattr(jp, name) for name in jp.__all__), lora_plus]:
        wrapped = getattr(factory, "__wrapped__", factory)
        names = getattr(wrapped, "__annotations__", {})
        for name, annotation in names.items():
            if annotation in (jp.Sites, jp.Sites | None) and name != "return":
                if isinstance(wrapped, type) or factory is jp.sites:
                    continue
                others = {
                    other: S.linear if kind in (jp.Sites, jp.Sites | None) else 2
                    for other, kind in names.items()
                    if other != "return"
                }
                with says(TypeError, f"`{factory.__name__}({name}='w')`: give a selection"):
                    call(wrapped, factory, {**others, name: "w"})
                checked += 1
    assert checked >= 50


def call(signature_of, factory, given):
    """The call with keyword arguments, or positional ones where they are variable."""
    import inspect

    kinds = inspect.signature(signature_of).parameters
    fixed = {n: v for n, v in given.items() if kinds[n].kind is not kinds[n].VAR_POSITIONAL}
    return factory(**{n: v for n, v in fixed.items() if kinds[n].kind is not kinds[n].VAR_KEYWORD})


def test_a_head_and_a_selection_need_a_pattern():
    with says(ValueError, "`linear_probe(sites, *head)` needs path patterns", "'head*'"):
        jp.linear_probe(S)
    with says(ValueError, "`match` needs at least one pattern"):
        S.match()


def test_bitfit_needs_a_bias():
    sites = jp.sites(lambda p, x: x @ p["w"], P, X)
    with says(
        ValueError,
        "`bitfit` trains biases",
        "none of the 3 parameters of this model is one: ['b', 'v', 'w']",
        "lora",
    ):
        jp.bitfit(sites)


@pytest.mark.parametrize(
    "method, caller",
    [
        (lambda: jp.lora(2, S.conv), "lora"),
        (lambda: jp.quantize("int8", S.embedding), "quantize"),
        (lambda: jp.unfreeze(S.expert), "unfreeze"),
        (lambda: jp.norm_tuning(S), "norm_tuning"),
    ],
)
def test_an_empty_selection_lists_choices(method, caller):
    there_is = "the matrices 'v', 'w'", "'b' (8,) (bias)"
    with says(ValueError, f"`{caller}` selects no parameter", *there_is):
        method()(KEY, P)


# Nodes of the user's own -----------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Strict:
    """Takes matrices only, as a class with checked types does."""

    kernel: jax.Array

    def __post_init__(self):
        if not hasattr(self.kernel, "ndim") or isinstance(self.kernel, jp.View):
            raise TypeError(f"kernel should be an array, is {type(self.kernel).__name__}")


@jax.tree_util.register_pytree_node_class
class Counted:
    """Fails with whatever Python raises on something that is not an array."""

    def __init__(self, kernel):
        self.kernel, self.bytes = kernel, 2 * np.dtype(kernel.dtype).itemsize + kernel.T.ndim

    def tree_flatten(self):
        return (self.kernel,), None

    @classmethod
    def tree_unflatten(cls, meta, children):
        return cls(*children)


@pytest.mark.parametrize("node", [Strict, Counted])
def test_a_node_that_takes_arrays_only_is_named(node):
    def f(p, x):
        return x @ p["block"][0].kernel

    p = {"block": [node(jnp.ones((6, 4)))], "other": jnp.ones(2)}
    sites = jp.sites(f, p, X)
    for method, what in (
        (jp.lora(2, sites.linear), "View"),
        (jp.full_finetuning(sites), "Trainable"),
    ):
        with says(TypeError, f"a node of class `{node.__name__}` that does not take a `{what}`"):
            method(KEY, p)
