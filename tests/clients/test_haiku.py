"""Networks of Haiku and of its modules, transformed into functions of parameters."""

import contextlib
import functools
import inspect
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

hk = pytest.importorskip("haiku", reason="make clients installs dm-haiku")
WIDTH = 16


def built(net: Callable, args: tuple) -> Model:
    """A network as a function of its parameters; its state is as it was made."""
    f = hk.without_apply_rng(hk.transform_with_state(net))
    training = {"training": True} if "training" in inspect.signature(net).parameters else {}
    init = functools.partial(f.init, **training)
    params, state = map(random_params, jax.eval_shape(init, jax.random.key(0), *args))
    return Model(lambda params, *args: f.apply(params, state, *args)[0], params, args)


def client(name: str, net: Callable, args: Callable[[], tuple], *paths: str, **rest: Any) -> Client:
    rest = dict(biases=r"/(b|offset)$") | rest
    return Client(name, lambda: built(net, args()), *paths, rows=rows, **rest)


@contextlib.contextmanager
def rows(of: dict[str, tuple[jax.Array, jax.Array]]) -> Iterator[None]:
    """Rows at the outputs of Haiku's linear layers, by the path of their weight."""
    plain = hk.Linear.__call__

    def call(self, x, *args, **kwargs):
        y = plain(self, x, *args, **kwargs)
        found = of.get(f"{self.module_name}/w")
        if found is None:
            return y
        values, virtual_positions = found
        return jnp.where(
            virtual_positions[..., None] >= 0, values[jnp.maximum(virtual_positions, 0)], y
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hk.Linear, "__call__", call)
        yield


def transformer(ids):
    """Two causal layers with a table of positions and a head of its own."""
    time = ids.shape[1]
    x = hk.Embed(VOCAB, WIDTH, name="words")(ids)
    x = x + hk.Embed(16, WIDTH, name="places")(jnp.arange(time))
    causal = jnp.tril(jnp.ones((1, 1, time, time), bool))
    init = hk.initializers.VarianceScaling()
    for i in range(2):
        norm = lambda name, i=i: hk.LayerNorm(-1, True, True, name=f"{name}{i}")  # noqa: E731
        y = norm("before_attention")(x)
        x = x + hk.MultiHeadAttention(2, 8, w_init=init, name=f"attention{i}")(y, y, y, causal)
        y = jax.nn.gelu(hk.Linear(24, name=f"up{i}")(norm("before_mlp")(x)))
        x = x + hk.Linear(WIDTH, name=f"down{i}")(y)
    return hk.Linear(VOCAB, name="head")(x)


def mlp(x):
    return hk.nets.MLP([24, 16, 5])(x)


def lstm(x):
    """(time, batch, n), as Haiku unrolls it."""
    core = hk.LSTM(WIDTH)
    out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.Linear(5, name="head")(out)


def gru(x):
    core = hk.GRU(WIDTH)
    out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.Linear(5, name="head")(out)


def resnet(x, training=False):
    return hk.nets.ResNet(
        blocks_per_group=(1, 1, 1, 1), num_classes=5, bottleneck=False, channels_per_group=(8,) * 4
    )(x, is_training=training)


def mobilenet(x, training=False):
    return hk.nets.MobileNetV1((1, 1), (8, 16), num_classes=5)(x, is_training=training)


CLIENTS = [
    client(
        "Haiku transformer",
        transformer,
        lambda: (tokens(0),),
        r"/w$",
        r"/key/w",
        r"/value/w",
        r"down./w",
        tables=r"embeddings",
        heads=r"head/w",
        norms=r"before_",
    ),
    client(
        "Haiku MLP",
        mlp,
        lambda: (random(0, 2, 7, 6),),
        r"/w$",
        r"linear_0/w",
        r"linear_1/w",
        r"linear_2/w",
        virtual={},
    ),
    client(
        "Haiku LSTM",
        lstm,
        lambda: (random(0, 7, 2, 6),),
        r"/w$",
        r"lstm/linear/w",
        r"lstm/linear/w",
        r"head/w",
        virtual={},
    ),
    client(
        "Haiku GRU",
        gru,
        lambda: (random(0, 7, 2, 6),),
        r"/w_[ih]$|head/w$",
        r"gru/w_i",
        r"gru/w_h",
        r"head/w",
        virtual={},
    ),
    client(
        "Haiku ResNet",
        resnet,
        lambda: (random(0, 2, 16, 16, 3),),
        r"/w$",
        r"conv_0/w",
        r"conv_1/w",
        virtual={},
        norms=r"batch_?norm",
    ),
    client(
        "Haiku MobileNet",
        mobilenet,
        lambda: (random(0, 2, 8, 8, 3),),
        r"/w$",
        r"depthwise_conv/w",
        r"pointwise_conv/w",
        virtual={},
        norms=r"batch_?norm",
    ),
]


@cases(CLIENTS)
def test_what_a_client_is_held_to(client, column):
    hold(client, column)
