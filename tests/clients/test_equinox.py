"""Networks of Equinox's modules, whose trees hold functions and numbers beside arrays."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from .harness import (
    VOCAB,
    Client,
    Model,
    cases,
    hold,
    random,
    random_params,
    tokens,
)

eqx = pytest.importorskip("equinox", reason="make clients installs equinox")
WIDTH = 16
KEY = jax.random.key(0)


def built(make: Callable[[jax.Array], Any], call: Callable, args: tuple, whole: bool) -> Model:
    """A module's arrays as parameters; with `whole`, the module is the tree, as it is."""
    arrays, static = eqx.partition(make(KEY), eqx.is_inexact_array)
    params = random_params(arrays)
    if whole:
        return Model(call, eqx.combine(params, static), args)
    return Model(lambda params, *args: call(eqx.combine(params, static), *args), params, args)


def client(
    name: str, make: Callable, call: Callable, args: Callable[[], tuple], *paths: str, **rest: Any
) -> Client:
    whole = rest.pop("whole", False)
    rest = dict(biases=r"bias(_n)?$") | rest
    return Client(name, lambda: built(make, call, args(), whole), *paths, rows=rows, **rest)


@contextlib.contextmanager
def rows(of: dict[str, tuple[jax.Array, jax.Array]]) -> Iterator[None]:
    """Rows at the outputs of the projections of `Block`s, by the path of their weight."""
    plain = eqx.nn.MultiheadAttention._project

    def project(self, linear, x):
        y = plain(self, getattr(linear, "inner", linear), x)
        return linear(y.reshape(len(x), -1)).reshape(y.shape) if isinstance(linear, Rows) else y

    Block.given = of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eqx.nn.MultiheadAttention, "_project", project)
        yield
    Block.given = {}


class Rows(eqx.Module):
    """A linear layer, and what stands at the virtual positions of its output."""

    inner: eqx.nn.Linear
    values: jax.Array
    virtual_positions: jax.Array

    def __call__(self, y):
        return jnp.where(
            self.virtual_positions[:, None] >= 0,
            self.values[jnp.maximum(self.virtual_positions, 0)],
            y,
        )


class Block(eqx.Module):
    """A causal layer over one example, (time, width)."""

    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    place: int = eqx.field(static=True)

    given = {}

    def __init__(self, place, key):
        keys = jax.random.split(key, 3)
        self.place = place
        self.attention = eqx.nn.MultiheadAttention(
            2, WIDTH, use_key_bias=True, use_value_bias=True, key=keys[0]
        )
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
        self.up = eqx.nn.Linear(WIDTH, 24, key=keys[1])
        self.down = eqx.nn.Linear(24, WIDTH, key=keys[2])

    def __call__(self, x, example):
        y = jax.vmap(self.norms[0])(x)
        attention = self.attention
        for name in ("key_proj", "value_proj"):
            path = f"blocks/{self.place}/attention/{name}/weight"
            if path in self.given:
                values, virtual_positions = self.given[path]
                told = Rows(getattr(attention, name), values, virtual_positions[example])
                attention = eqx.tree_at(lambda a, name=name: getattr(a, name), attention, told)
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + attention(y, y, y, mask=causal)
        y = jax.vmap(self.up)(jax.vmap(self.norms[1])(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y))


class Transformer(eqx.Module):
    """Two causal layers, with a table of positions and a head of its own."""

    words: eqx.nn.Embedding
    places: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.words = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.places = eqx.nn.Embedding(16, WIDTH, key=keys[1])
        self.blocks = [Block(i, k) for i, k in enumerate(keys[2:4])]
        self.head = eqx.nn.Linear(WIDTH, VOCAB, key=keys[4])

    def __call__(self, ids, example):
        x = jax.vmap(self.words)(ids) + jax.vmap(self.places)(jnp.arange(len(ids)))
        for block in self.blocks:
            x = block(x, example)
        return jax.vmap(self.head)(x)


def each_row(model, ids):
    return jax.vmap(model)(ids, jnp.arange(len(ids)))


class Recurrent(eqx.Module):
    """A cell over time, and what reads its states."""

    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, kind, key):
        keys = jax.random.split(key)
        self.cell = kind(6, WIDTH, key=keys[0])
        self.head = eqx.nn.Linear(WIDTH, 5, key=keys[1])

    def __call__(self, xs):
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)
        start = jnp.zeros(WIDTH)

        def step(state, x):
            state = self.cell(x, state)
            return state, state[0] if lstm else state

        _, ys = jax.lax.scan(step, (start, start) if lstm else start, xs)
        return jax.vmap(self.head)(ys)


class Convolutions(eqx.Module):
    """Two convolutions, one of them in groups and one transposed, and a linear layer."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    third: eqx.nn.ConvTranspose2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.first = eqx.nn.Conv2d(3, 8, 3, key=keys[0])
        self.second = eqx.nn.Conv2d(8, 8, 3, groups=2, key=keys[1])
        self.third = eqx.nn.ConvTranspose2d(8, 8, 2, key=keys[2])
        self.head = eqx.nn.Linear(8, 5, key=keys[3])

    def __call__(self, x):
        x = self.second(jax.nn.gelu(self.first(x)))
        return self.head(jnp.mean(jax.nn.gelu(self.third(x)), (1, 2)))


def batched(model, *args):
    return jax.vmap(model)(*args)


MLP = (
    lambda key: eqx.nn.MLP(6, 5, WIDTH, 2, key=key),
    batched,
    lambda: (random(0, 7, 6),),
    r"weight",
    r"layers/0/weight",
    r"layers/1/weight",
    r"layers/2/weight",
)
CELL = (
    batched,
    lambda: (random(0, 2, 7, 6),),
    r"weight",
    r"cell/weight_ih",
    r"cell/weight_hh",
    r"head/weight",
)
CLIENTS = [
    client(
        "Equinox transformer",
        Transformer,
        each_row,
        lambda: (tokens(0),),
        r"(proj|up|down|head)/weight",
        r"key_proj/weight",
        r"value_proj/weight",
        r"down/weight",
        tables=r"(words|places)/weight",
        heads=r"head/weight",
        norms=r"norms",
    ),
    client("Equinox MLP", *MLP, virtual={}),
    client("Equinox MLP as it is", *MLP, virtual={}, whole=True),
    client("Equinox GRU", lambda key: Recurrent(eqx.nn.GRUCell, key), *CELL, virtual={}),
    client("Equinox LSTM", lambda key: Recurrent(eqx.nn.LSTMCell, key), *CELL, virtual={}),
    client(
        "Equinox convolutions",
        Convolutions,
        batched,
        lambda: (random(0, 2, 3, 8, 8),),
        r"weight",
        r"first/weight",
        r"second/weight",
        virtual={},
    ),
]


@cases(CLIENTS)
def test_what_a_client_is_held_to(client, column):
    hold(client, column)
