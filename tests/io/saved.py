"""Adapter folders as earlier versions wrote them, and what they must go on giving.

Every method and every format has a folder in `tests/io/folders/format<n>/`, beside its
arrays and description the outputs that the lifted model had when it was saved. A base is
small and follows from the names of its arrays alone; nothing here may ever change that.

    python -m tests.io.saved    writes the folders of today's format that are not there yet

What is there is never written again: a folder stands for the version that wrote it.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft.io import save_adapter
from jaxpeft.io._description import FORMAT

FOLDERS = Path(__file__).parent / "folders"
KEY = jax.random.key(1)
D, F, L, V, E, O = 4, 6, 2, 7, 3, 5  # noqa: E741
FULL = jnp.float64


def numbers(name: str, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1) that follow from a name alone, on every machine and version."""
    bits = hashlib.shake_256(f"{name} {shape}".encode()).digest(4 * int(np.prod(shape)))
    return np.frombuffer(bits, "<u4").reshape(shape) / 2.0**31 - 1


def uniform(name: str, *shape: int, dtype: Any = FULL) -> jax.Array:
    return jnp.asarray(numbers(name, *shape), dtype)


def arrays(*lead: int, dtype: Any = FULL, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Arrays by name; a name that ends in `scale` or `var` is around 1.5."""
    return {
        name: uniform(name, *lead, *shape, dtype=dtype)
        + (1.5 if name.endswith(("scale", "var")) else 0)
        for name, shape in shapes.items()
    }


# Bases --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, its parameters and what it is called with."""

    fn: Callable[..., Any]
    params: Any
    args: tuple

    @functools.cached_property
    def sites(self) -> jp.Sites:
        return jp.sites(self.fn, self.params, *self.args)


BASES: dict[str, Callable[[], Base]] = {}


def base(build: Callable[[], Base]) -> Callable[[], Base]:
    cached = functools.cache(build)
    BASES[build.__name__] = cached
    return cached


def feed_forward(p, x):
    return jnp.tanh(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


MLP = dict(up=(D, F), up_bias=(F,), down=(F, D), down_bias=(D,))


@base
def mlp():
    return Base(feed_forward, arrays(**MLP), (uniform("x", 3, D),))


@base
def half():
    """In bfloat16, with adapters in float32, as they are by default."""
    args = (uniform("x", 3, D, dtype=jnp.bfloat16),)
    return Base(feed_forward, arrays(**MLP, dtype=jnp.bfloat16), args)


def norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def attend(q, k, v):
    heads = [y.reshape(*y.shape[:-1], 2, -1) for y in (q, k, v)]
    scores = jnp.einsum("btnh,bsnh->bnts", *heads[:2])
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), heads[2]).reshape(q.shape)


@base
def layers():
    """Whole layers of a transformer, each norm behind its sum, under a scan."""

    def layer(x, p):
        q, k, v = (x @ p[n] + p[f"{n}_bias"] for n in "qkv")
        x = norm(x + attend(q, k, v) @ p["o"] + p["o_bias"], p["attn_scale"], p["attn_bias"])
        return norm(x + feed_forward(p, x), p["mlp_scale"], p["mlp_bias"]), None

    kernels = {n: (D, D) for n in "qkvo"} | {f"{n}_bias": (D,) for n in "qkvo"}
    norms = {f"{at}_{what}": (D,) for at in ("attn", "mlp") for what in ("scale", "bias")}
    params = arrays(L, **kernels, **norms, **MLP)
    return Base(lambda p, x: jax.lax.scan(layer, x, p)[0], params, (uniform("x", 2, O, D),))


@base
def quantized():
    """The same layers, every kernel in another format before there is any adapter."""
    dense = layers()
    formats = {
        "q": ("nf4+dq", dict(block=2)),
        "k": ("nf4+dq", dict(block=8, layout="flat")),
        "v": ("int8", {}),
        "o": ("int8", dict(block=2)),
        "up": ("int4+asym", dict(block=3)),
        "down": ("fp8", {}),
    }
    steps = [jp.quantize(f, dense.sites.match(path), **o) for path, (f, o) in formats.items()]
    return Base(dense.fn, jp.chain(*steps)(KEY, dense.params), dense.args)


@base
def tied():
    """A table that is read by row and is the head as well."""

    def fn(p, ids):
        h = norm(p["table"][ids], p["norm_scale"], p["norm_bias"])
        return (h + feed_forward(p, h)) @ p["table"].T

    shapes = dict(table=(V, D), norm_scale=(D,), norm_bias=(D,), **MLP)
    return Base(fn, arrays(**shapes), (jnp.arange(6).reshape(2, 3),))


@base
def lengths():
    """Kernels that have as many outputs as a table has rows."""

    def fn(p, ids):
        x = p["table"][ids] + p["places"][jnp.arange(ids.shape[1])]
        return jnp.tanh(jnp.tanh(x @ p["q"]) @ p["o"]) @ p["head"]

    shapes = dict(table=(V, D), places=(D, D), q=(D, D), o=(D, D), head=(D, V))
    return Base(fn, arrays(**shapes), (jnp.arange(6).reshape(2, 3),))


@base
def conv():
    def fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y + p["bias"]).mean((1, 2)) @ p["head"]

    shapes = dict(kernel=(2, 3, D, F), bias=(F,), head=(F, O))
    return Base(fn, arrays(**shapes), (uniform("x", 2, 3, 3, D),))


@base
def ragged():
    """Experts, each on the rows that are its own."""

    def fn(p, x):
        sizes = jnp.array([2, 1, 3], jnp.int32)
        h = jax.lax.ragged_dot(x, p["up"], sizes)
        return jax.lax.ragged_dot(jnp.tanh(h), p["down"], sizes)

    return Base(fn, arrays(up=(E, D, F), down=(E, F, D)), (uniform("x", 6, D),))


@base
def mixed():
    """All experts on all tokens; the router's weights mix them."""

    def fn(p, x):
        h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
        y = jnp.einsum("tef,efd->ted", h, p["down"])
        return jnp.einsum("ted,te->td", y, jax.nn.softmax(x @ p["router"]))

    shapes = dict(up=(E, D, F), down=(E, F, D), router=(D, E))
    return Base(fn, arrays(**shapes), (uniform("x", 5, D),))


@base
def gathered():
    """The matrix of a token's expert, gathered by its number."""

    def fn(p, x, expert):
        h = jnp.tanh(jnp.einsum("td,tdf->tf", x, p["up"][expert]))
        return jnp.einsum("tf,tfd->td", h, p["down"][expert])

    params = arrays(up=(E, D, F), down=(E, F, D))
    return Base(fn, params, (uniform("x", 5, D), jnp.array([0, 2, 1, 1, 0])))


@base
def groups():
    """A block-diagonal matrix: a product for each group of channels."""

    def fn(p, x):
        return jnp.einsum("bgf,gfd->bgd", jnp.tanh(jnp.einsum("bgd,gdf->bgf", x, p["up"])), p["dn"])

    return Base(fn, arrays(up=(E, D, F), dn=(E, F, D)), (uniform("x", 2, E, D),))


@base
def ensemble():
    """Models side by side under `vmap`, of which no program says that they are several."""

    def fn(p, x):
        return jax.vmap(feed_forward, in_axes=(0, None), out_axes=1)(p, x)

    return Base(fn, arrays(E, **MLP), (uniform("x", 3, D),))


@base
def fused():
    """Query, key and value in one kernel; weights with an axis of heads, and transposed ones."""

    def fn(p, x):
        y = attend(*jnp.split(x @ p["qkv"] + p["qkv_bias"], 3, -1))
        y = jnp.einsum("btnh,nhd->btd", jnp.einsum("btd,dnh->btnh", y, p["heads"]), p["o"])
        return y @ p["head"].T

    shapes = dict(qkv=(D, 3 * D), qkv_bias=(3 * D,), heads=(D, 2, 3), o=(2, 3, D), head=(O, D))
    return Base(fn, arrays(**shapes), (uniform("x", 2, 3, D),))


@base
def statistics():
    """A normalization by stored statistics, and a kernel that is divided by its columns' norm."""

    def fn(p, x):
        x = (x - p["mean"]) / jnp.sqrt(p["var"]) * p["scale"] + p["bias"]
        return x @ p["w"] + p["w_bias"]

    shapes = dict(mean=(D,), var=(D,), scale=(D,), bias=(D,), w=(D, O), w_bias=(O,))
    return Base(fn, arrays(**shapes), (uniform("x", 3, D),))


# Cases --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder: of which base, what was saved, and what a call is given.

    Attributes:
      base: Its name.
      make: From the base to (method, frozen, trained adapter), or to the method alone.
      given: Values of a call, for `combine`.
      args: Arguments of the model, where they are not those of the base.
    """

    base: str
    make: Callable[[Base], Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    args: Callable[[Base], tuple] = lambda b: b.args


def perturbed(adapter: Mapping[str, Any], size: float = 0.3) -> dict[str, Any]:
    """Every array moved away from where it starts."""
    return {
        path: (x + size * uniform(path, *x.shape)).astype(x.dtype) for path, x in adapter.items()
    }


def on(name: str, make: Callable[[jp.Sites], Any], **options: Any) -> Case:
    return Case(name, lambda b: make(b.sites), **options)


def as_lora(method: Any) -> Callable[[Base], Any]:
    """What is saved of a method that starts from data, or whose start is another base."""

    def make(b: Base) -> Any:
        own = method(b)
        frozen, start = jp.split(own(KEY, b.params))
        plain, low = jp.adapters.to_lora(own, perturbed(start), start)
        return plain, jp.split(plain(KEY, b.params))[0], low

    return make


def _corda(b):
    moments = jp.calibration.input_moments(b.fn, b.params, b.sites.linear, [b.args[0]])
    return jp.corda(1, b.sites.linear, moments, dtype=FULL)


def _eva(b):
    moments = jp.calibration.input_moments(b.fn, b.params, b.sites.linear, [b.args[0]])
    return jp.eva(1, b.sites.linear, moments, dtype=FULL)


def _lora_ga(b):
    loss = lambda p, x: jnp.sum(b.fn(p, x) ** 2)  # noqa: E731
    found = jp.calibration.mean_gradients(loss, b.params, b.sites.linear, [b.args[0]])
    return jp.lora_ga(1, b.sites.linear, found, dtype=FULL)


def _for_task(b):
    method = jp.moelora(4, b.sites.linear, experts=2, tasks=3, task_embedding_dim=5, dtype=FULL)
    _, start = jp.split(method(KEY, b.params))
    plain, own = jp.mixtures.select_task(method, perturbed(start), 1)
    return plain, jp.split(plain(KEY, b.params))[0], own


def _masks(sites):
    return {
        path: np.asarray(uniform(f"mask of {path}", *s.shape)) < 0.2 for path, s in sites.items()
    }


def _pruned(sites):
    prune = jp.prune(_masks(sites.linear), sites.linear)
    return jp.chain(prune, jp.lora(2, sites.linear, dtype=FULL), prune)


def qlora(format, **options):
    def make(sites):
        quantize = jp.quantize(format, sites.matrices, **options)
        return jp.chain(quantize, jp.lora(2, sites.matrices, alpha=3.0, dtype=FULL))

    return make


def virtual(b):
    (table,) = b.sites.match("table").values()
    first, second = jp.prompts.virtual_token_ids(table, 2)
    return (b.args[0].at[0, 1].set(second).at[1, 2].set(first),)


def lora(sites, **options):
    return jp.lora(2, sites, alpha=3.0, dtype=FULL, **options)


VIRTUAL_POSITIONS = dict(virtual_positions=np.array([[0, 1, -1, -1, -1], [-1, 0, 1, -1, -1]]))
EXPERTS = {
    f"{path}/experts/{name}": numbers(f"{path} {name}", *shape)
    for path, n, m in (("up", D, F), ("down", F, D))
    for name, shape in (("a", (n, 3)), ("b", (3, m)))
}

CASES: dict[str, Case] = {
    # One of each method.
    "lora": on("mlp", lambda s: lora(s.linear)),
    "lora_by_pattern": on(
        "mlp",
        lambda s: jp.lora(
            {"up": 3, "*": 2},
            s.linear,
            alpha={"down": 1.5, "*": 3.0},
            scaling="alpha/sqrt(r)",
            init="gaussian",
            dropout=0.1,
            dtype=FULL,
        ),
    ),
    "dora": on("mlp", lambda s: jp.dora(2, s.linear, alpha=3.0, dtype=FULL)),
    "lora_fa": on("mlp", lambda s: jp.lora_fa(2, s.linear, alpha=3.0, dtype=FULL)),
    "adalora": on("mlp", lambda s: jp.adalora(2, s.linear, alpha=3.0, init_std=0.5, dtype=FULL)),
    "pissa": on("mlp", lambda s: jp.pissa(2, s.linear, alpha=3.0, dtype=FULL)),
    "pissa_as_lora": Case("mlp", as_lora(lambda b: jp.pissa(2, b.sites.linear, dtype=FULL))),
    "olora": on("mlp", lambda s: jp.olora(2, s.linear, dtype=FULL)),
    "eva": Case("mlp", _eva),
    "corda_as_lora": Case("mlp", as_lora(_corda)),
    "lora_ga_as_lora": Case("mlp", as_lora(_lora_ga)),
    "longlora": on(
        "tied", lambda s: jp.longlora(2, s.linear, s.embedding, s.norm, alpha=3.0, dtype=FULL)
    ),
    "hira": on("mlp", lambda s: jp.hira(2, s.linear, alpha=12.0, dtype=FULL)),
    "vera": on("mlp", lambda s: jp.vera(4, s.linear, dtype=FULL)),
    "loha": on("mlp", lambda s: jp.loha(2, s.linear, alpha=3.0, dtype=FULL)),
    "lokr": on(
        "mlp",
        lambda s: jp.lokr(
            1, s.linear, decompose_factor={"up": (2, 3), "*": 2}, alpha=3.0, dtype=FULL
        ),
    ),
    "miss": on("mlp", lambda s: jp.miss(2, s.linear, dtype=FULL)),
    "oft": on("mlp", lambda s: jp.oft(2, s.linear, dtype=FULL)),
    "oft_shared": on(
        "mlp", lambda s: jp.oft(2, s.linear, block_share=True, neumann_terms=4, dtype=FULL)
    ),
    "boft": on("mlp", lambda s: jp.boft(2, s.match("up"), n_butterfly_factors=2, dtype=FULL)),
    "hra": on("mlp", lambda s: jp.hra(2, s.linear, dtype=FULL)),
    "road": on("mlp", lambda s: jp.road(s.linear, variant=2, dtype=FULL)),
    "ia3": on("mlp", lambda s: jp.ia3(s.match("up"), s.match("down"), dtype=FULL)),
    "prompt": on("tied", lambda s: jp.prompt_tuning(2, s.embedding, dtype=FULL), args=virtual),
    "prompt_of_ids": on(
        "tied", lambda s: jp.prompt_tuning(2, s.embedding, init=[3, 1], dtype=FULL), args=virtual
    ),
    "p_tuning": on(
        "tied", lambda s: jp.p_tuning(2, s.embedding, hidden=3, embed=4, dtype=FULL), args=virtual
    ),
    "trainable_tokens": on(
        "tied", lambda s: jp.trainable_tokens([1, 4, 5], s.embedding, dtype=FULL)
    ),
    "prefix": on(
        "layers",
        lambda s: jp.prefix_tuning(2, s.match("k"), s.match("v"), dtype=FULL),
        given=VIRTUAL_POSITIONS,
    ),
    "encoded_prefix": on(
        "layers",
        lambda s: jp.prefix_tuning(2, s.match("k"), s.match("v"), hidden=3, embed=2, dtype=FULL),
        given=VIRTUAL_POSITIONS,
    ),
    "bottleneck": on(
        "mlp",
        lambda s: jp.bottleneck_adapter(3, s.linear, activation="tanh", scale=1.5, dtype=FULL),
    ),
    "bottleneck_on_the_sum": on(
        "layers",
        lambda s: jp.bottleneck_adapter(
            3,
            s.match("down"),
            adapter_input="output_plus_residual",
            norms=s.match("mlp_scale", "mlp_bias"),
            dtype=FULL,
        ),
    ),
    "parallel": on(
        "mlp",
        lambda s: jp.parallel_adapter(3, s.match("up"), s.match("down"), scale=1.5, dtype=FULL),
    ),
    "mam": on(
        "layers",
        lambda s: jp.mam(
            2, 3, *map(s.match, ("k", "v", "up", "down")), activation="tanh", dtype=FULL
        ),
        given=VIRTUAL_POSITIONS,
    ),
    "unipelt": on(
        "layers",
        lambda s: jp.unipelt(
            s.match("q", "v"),
            *map(s.match, ("k", "v", "down")),
            rank=2,
            length=2,
            bottleneck_dim=3,
            norms=s.match("mlp_scale", "mlp_bias"),
            dtype=FULL,
        ),
        given=VIRTUAL_POSITIONS,
    ),
    "moelora": on(
        "mlp",
        lambda s: jp.moelora(
            4, s.linear, experts=2, tasks=3, task_embedding_dim=5, alpha=6.0, dtype=FULL
        ),
        given=dict(task=np.array(2)),
    ),
    "moelora_for_task": Case("mlp", _for_task),
    "poly": on(
        "mlp",
        lambda s: jp.poly(2, s.linear, skills=4, tasks=3, alpha=3.0, dtype=FULL),
        given=dict(task=np.array(2)),
    ),
    "xlora": on(
        "mlp",
        lambda s: jp.xlora(
            s.linear, {path: [2, 1] for path in s.linear}, hidden_size=5, dtype=FULL
        ),
        given={**EXPERTS, "hidden_states": numbers("hidden", 5)},
    ),
    "sparse": on("mlp", lambda s: jp.sparse_delta(0.3, s.linear, dtype=FULL)),
    "sparse_masks": on("mlp", lambda s: jp.sparse_delta(_masks(s.linear), s.linear, dtype=FULL)),
    "prune": on("mlp", _pruned),
    "gates": on(
        "mlp",
        lambda s: jp.gates(s.linear, kind="sigmoid", structure="output", start=0.7, dtype=FULL),
        given=dict(inverse_temperature=np.array(1.5)),
    ),
    "gates_of_blocks": on(
        "mlp",
        lambda s: jp.gates(s.linear, kind="sigmoid", structure=(2, None), start=0.7, dtype=FULL),
        given=dict(inverse_temperature=np.array(1.5)),
    ),
    "bitfit": on("layers", jp.bitfit),
    "norm_tuning": on("layers", jp.norm_tuning),
    "linear_probe": on("conv", lambda s: jp.linear_probe(s, "head")),
    "last_layers": on("layers", lambda s: jp.last_layers(s, 1, "*")),
    "full": on("mlp", jp.full_finetuning),
    "unfreeze": on("mlp", lambda s: jp.unfreeze(s.match("*bias", "down"))),
    "chain": on("tied", lambda s: jp.chain(lora(s.linear), jp.norm_tuning(s), lora(s.embedding))),
    # One of each format; blocks so small that a weight has several, some cut short.
    "nf4": on("mlp", qlora("nf4", block=4)),
    "nf4_dq": on("mlp", qlora("nf4+dq", block=4)),
    "nf4_flat": on("mlp", qlora("nf4+dq", block=8, layout="flat")),
    "fp4": on("mlp", qlora("fp4", block=3)),
    "fp4_dq": on("mlp", qlora("fp4+dq", block=4)),
    "int4": on("mlp", qlora("int4", block=2)),
    "int4_asym": on("mlp", qlora("int4+asym", block=5)),
    "int8": on("mlp", qlora("int8")),
    "int8_blocks": on("mlp", qlora("int8", block=2)),
    "fp8": on("mlp", qlora("fp8")),
    "loftq": on("mlp", lambda s: jp.loftq(2, s.linear, format="nf4", block=2, dtype=FULL)),
    "loftq_principal": on(
        "mlp",
        lambda s: jp.loftq(2, s.linear, format="int8", init="pissa", dtype=FULL),
    ),
    # Sites of every style: as they were found when the folder was saved, they stay.
    "lora_in_half": on("half", lambda s: jp.lora(2, s.linear, alpha=3.0)),
    "ia3_in_half": on("half", lambda s: jp.ia3(s.linear)),
    "qlora_in_half": on(
        "half", lambda s: jp.chain(jp.quantize("nf4", s.linear, block=4), jp.lora(2, s.linear))
    ),
    "lora_under_scan": on("layers", lambda s: lora(s.linear)),
    "qlora_under_scan": on("layers", qlora("nf4+dq", block=4)),
    "lora_on_quantized": Case("quantized", lambda b: lora(layers().sites.linear)),
    "dora_under_scan": on("layers", lambda s: jp.dora(2, s.linear, dtype=FULL)),
    "gates_of_entries": on(
        "layers",
        lambda s: jp.gates(s.linear, kind="sigmoid", start=0.7, dtype=FULL),
        given=dict(inverse_temperature=np.array(1.5)),
    ),
    "lora_on_tied": on("tied", lambda s: lora(s.matrices)),
    "int8_on_tied": on("tied", qlora("int8")),
    "hidden_by_length": on(
        "lengths", lambda s: jp.chain(jp.quantize("int8", s.hidden | s.match("q")), lora(s.linear))
    ),
    "lora_on_conv": on("conv", lambda s: lora(s.matrices)),
    "hra_on_conv": on("conv", lambda s: jp.hra(2, s.matrices, dtype=FULL)),
    "int4_on_conv": on("conv", qlora("int4", block=4)),
    "lora_on_ragged": on("ragged", lambda s: lora(s.expert)),
    "dora_on_ragged": on("ragged", lambda s: jp.dora(2, s.matrices, dtype=FULL)),
    "qlora_on_ragged": on("ragged", qlora("nf4", block=4)),
    "lora_on_mixed": on("mixed", lambda s: lora(s.matrices)),
    "loha_on_mixed": on("mixed", lambda s: jp.loha(2, s.matrices, dtype=FULL)),
    "qlora_on_mixed": on("mixed", qlora("int8")),
    "lora_on_gathered": on("gathered", lambda s: lora(s.matrices)),
    "int8_on_gathered": on("gathered", qlora("int8")),
    "lora_on_groups": on("groups", lambda s: lora(s.matrices)),
    "ia3_on_groups": on("groups", lambda s: jp.ia3(s.matrices, dtype=FULL)),
    "lora_on_ensemble": on(
        "ensemble", lambda s: lora(s.override("up", "stack", "in", "out").match("up"))
    ),
    "lora_on_parts": on(
        "fused",
        lambda s: jp.chain(
            lora(s.match("qkv").output_slice(0, 3)), lora(s.match("heads").output_slice(1, 2, 3))
        ),
    ),
    "lora_on_heads": on("fused", lambda s: lora(s.match("heads", "o", "head"))),
    "vera_on_heads": on("fused", lambda s: jp.vera(3, s.match("heads", "o", "head"), dtype=FULL)),
    "bitfit_with_statistics": on("statistics", jp.bitfit),
    "norm_tuning_with_statistics": on("statistics", jp.norm_tuning),
}


def made(case: Case) -> tuple[Any, Any, dict[str, Any]]:
    """(method, frozen, trained adapter) of a case."""
    b = BASES[case.base]()
    found = case.make(b)
    if isinstance(found, tuple):
        return found
    frozen, start = jp.split(found(KEY, b.params))
    return found, frozen, perturbed(start)


def outputs(case: Case, frozen: Any, adapter: Mapping[str, Any]) -> np.ndarray:
    """Of the lifted model, and in float64."""
    b = BASES[case.base]()
    tree = jp.combine(frozen, adapter, **case.given)
    return np.asarray(jp.lift(b.fn)(tree, *case.args(b)), np.float64)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    root = FOLDERS / f"format{FORMAT}"
    for name, case in CASES.items():
        if (folder := root / name).exists():
            continue
        method, frozen, trained = made(case)
        save_adapter(folder, trained, method, BASES[case.base]().params, key=KEY)
        np.save(folder / "outputs.npy", outputs(case, frozen, trained))
        print(folder, file=sys.stderr)


if __name__ == "__main__":
    main()
