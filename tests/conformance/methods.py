"""The methods that the table is run over: a new one is one entry of METHODS."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import jaxpeft as jp

from . import by_hand
from .rows.row import D, F, H, N, random

# The program's own product makes a complex copy of its real weight.
_PROMOTED = ("complex activations",)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method, and what is true of it.

    Attributes:
      name: For the test's name.
      make: From the model's sites and the adapter's dtype to the method.
      roles: The kinds of weight it takes: "linear", "embedding", "conv".
      factored: Whether it never forms an array of a weight's size. False only where the
        method's own formula does (a norm over the columns of the sum, values to dequantize).
      coarse: Rows whose sizes its blocks do not fit: cut, or as large as the weight, so that
        dense arrays may be formed.
      keeps_base: Whether the base's arrays stay what they were.
      on_trained: Whether it can be put on a weight that another method trains.
      rows: The rows of the everyday suite, by role; the others run in the full product.
      by_hand: Where a weight has no dense equivalent: from (adapter, given) to what a model
        in by_hand.py calls in the place of a product or a table. `None`: merge says it.
      models: Its rows, each with the model written by hand; the others are not its own.
      refused: Rows that it cannot be right on, and a pattern of what the error says.
      args: From the row's arguments and the sites to arguments with virtual tokens in them.
      given: What `combine` is given in a call with these arguments.
    """

    name: str
    make: Callable[[Any, Any], Any]
    roles: tuple[str, ...] = ("linear", "embedding", "conv")
    factored: bool = True
    keeps_base: bool = True
    on_trained: bool = True
    coarse: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("x @ w", "tied head", "lax.scan over layers", "experts by ragged_dot")
    by_hand: Callable[..., Any] | None = None
    models: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    args: Callable[[tuple, Any], tuple] = lambda args, sites: args
    given: Callable[[tuple], dict[str, Any]] = lambda args: {}

    def is_factored(self, row: Any) -> bool:
        """Whether the test of sizes holds on a row."""
        whole = self.coarse + _PROMOTED
        return self.factored and row.name not in whole and not row.materializes

    def takes(self, row: Any) -> bool:
        """Whether the laws of the table hold for it on a row."""
        if self.by_hand:
            return row.name in self.models
        return any(getattr(row, role) for role in self.roles)


def _lora(sites, dtype):
    return jp.lora(2, sites.matrices, alpha=3.0, dtype=dtype)


def _lora_on_nf4(sites, dtype):
    return jp.chain(
        jp.quantize("nf4+dq", sites.linear, block=2),
        jp.lora(2, sites.linear, alpha=3.0, scaling="alpha/sqrt(r)", dtype=dtype),
    )


def _dora(sites, dtype):
    return jp.dora(2, sites.matrices, alpha=3.0, dtype=dtype)


def _lora_fa(sites, dtype):
    return jp.lora_fa(2, sites.matrices - sites.embedding, alpha=3.0, dtype=dtype)


def _adalora(sites, dtype):
    return jp.adalora(2, sites.matrices, alpha=3.0, init_std=0.5, dtype=dtype)


def _pissa(sites, dtype):
    return jp.pissa(2, sites.matrices, alpha=3.0, dtype=dtype)


def _olora(sites, dtype):
    return jp.olora(2, sites.matrices, dtype=dtype)


def _sparse(sites, dtype):
    return jp.sparse_delta(0.3, sites.matrices, dtype=dtype)


def _under_a_mask(sites, dtype):
    rng = np.random.default_rng(0)
    masks = {path: rng.random(site.shape) < 0.6 for path, site in sites.matrices.items()}
    pruned = jp.prune(masks, sites.matrices)
    return jp.chain(pruned, jp.lora(2, sites.matrices, alpha=3.0, dtype=dtype), pruned)


def _hira(sites, dtype):
    return jp.hira(2, sites.matrices, alpha=12.0, dtype=dtype)


def _vera(sites, dtype):
    return jp.vera(4, sites.matrices, dtype=dtype)


def _loha(sites, dtype):
    return jp.loha(2, sites.matrices, alpha=3.0, dtype=dtype)


def _lokr(sites, dtype):
    """OFT in blocks that no row cuts where it cuts a weight: inputs of `down`, outputs of `qkv`."""
    chosen = sites.matrices - sites.conv
    blocks = {
        path: (F if site.size("in") == F else None, 3 if site.size("out") == 3 * N * H else None)
        for path, site in chosen.items()
    }
    return jp.lokr(2, chosen, decompose_factor=blocks, alpha=3.0, dtype=dtype)


def _miss(sites, dtype):
    return jp.miss(2, sites.matrices, dtype=dtype)


def _largest_prime(site, side):
    """A prime factor of a side, by which the shards that devices have of the side divide, too."""
    n, p = site.size(side), 2
    while p < n:
        n, p = (n // p, p) if n % p == 0 else (n, p + 1)
    return n


def _oft(sites, dtype):
    blocks = {path: _largest_prime(site, "in") for path, site in sites.linear.items()}
    return jp.oft(blocks, sites.linear, dtype=dtype)


def _boft(sites, dtype):
    """BOFT with one factor, since no side of the rows is even. test_rotations.py has more."""
    blocks = {path: _largest_prime(site, "in") for path, site in sites.linear.items()}
    return jp.boft(blocks, sites.linear, n_butterfly_factors=1, dtype=dtype)


def _hra(sites, dtype):
    return jp.hra(2, sites.matrices, dtype=dtype)


def _road(sites, dtype):
    groups = {path: _largest_prime(site, "out") for path, site in sites.matrices.items()}
    return jp.road(sites.matrices, variant=2, group_size=groups, dtype=dtype)


def _bottleneck(sites, dtype):
    return jp.bottleneck_adapter(3, sites.linear, dtype=dtype)


def _on_the_sum(sites, dtype):
    """An adapter after the feed-forward block, with the norm of the sum where there is one."""
    down = sites.linear.match(re.compile(r"\bdown\b"))
    names = ("mlp_scale", "mlp_bias")
    norms = sites.match(*names) if "mlp_scale" in sites else None
    return jp.bottleneck_adapter(
        3, down, adapter_input="output_plus_residual", norms=norms, dtype=dtype
    )


def _parallel(sites, dtype):
    first, last = (sites.match(re.compile(rf"\b{name}\b")) for name in ("up", "down"))
    first, last = first & sites.linear, last & sites.linear
    return jp.parallel_adapter(3, first, last, scale=1.5, activation="tanh", dtype=dtype)


def _prefix(sites, dtype):
    """A prefix at keys and values; in a model without them, where batch and time stay apart."""
    keys = sites.linear.match(re.compile(r"(^|/)(up|[kv]|(key|value)/kernel)\b"))
    return jp.prefix_tuning(2, keys, keys - keys, dtype=dtype)


def _encoded_prefix(sites, dtype):
    keys = sites.linear.match(re.compile(r"(^|/)(up|[kv]|(key|value)/kernel)\b"))
    return jp.prefix_tuning(2, keys, keys - keys, hidden=5, embed=4, dtype=dtype)


def _mam(sites, dtype):
    return jp.mam(
        2, 3, *map(sites.match, ("k", "v", "up", "down")), scale=1.5, activation="tanh", dtype=dtype
    )


def _unipelt(sites, dtype):
    norms = sites.match("mlp_scale", "mlp_bias")
    return jp.unipelt(
        sites.match("q", "v"),
        *map(sites.match, ("k", "v", "down")),
        rank=2,
        length=2,
        bottleneck_dim=3,
        norms=norms,
        dtype=dtype,
    )


def _ia3_on_a_part(sites, dtype):
    """The second of as many blocks as the largest prime in each weight's outputs.

    Over LoRA, since one output of many does not always move those of the model.
    """
    parts = [
        sites.match(path.replace("[", "[[]")).output_slice(1, _largest_prime(site, "out"))
        for path, site in sites.linear.items()
    ]
    scaled = jp.ia3(functools.reduce(operator.or_, parts), dtype=dtype)
    return jp.chain(jp.lora(2, sites.linear, dtype=dtype), scaled)


def _moelora(sites, dtype):
    return jp.moelora(
        4, sites.linear, experts=2, tasks=3, task_embedding_dim=5, alpha=6.0, dtype=dtype
    )


def _poly(sites, dtype):
    return jp.poly(2, sites.linear, skills=4, tasks=3, alpha=3.0, dtype=dtype)


def _gates(sites, dtype):
    return jp.gates(sites.matrices, kind="sigmoid", structure="output", start=0.7, dtype=dtype)


def _gated_entries(sites, dtype):
    return jp.gates(sites.matrices, kind="sigmoid", start=0.7, dtype=dtype)


def _inverse_temperature(args):
    return {"inverse_temperature": np.array(1.5)}


def _xlora(sites, dtype):
    ranks = {path: [2, 1] for path in sites.linear}
    return jp.xlora(sites.linear, ranks, hidden_size=5, dtype=dtype)


def _experts(args):
    """Factors of two experts at the two weights of the row, and the input of the gates."""
    arrays = {
        f"{path}/experts/{name}": random(*shape, seed=20 + i, scale=0.5)
        for path, sides in (("up", (D, F)), ("down", (F, D)))
        for i, (name, shape) in enumerate({"a": (sides[0], 3), "b": (3, sides[1])}.items())
    }
    return {**arrays, "hidden_states": random(5, seed=30, scale=1.0)}


def _one_task(args):
    return {"task": np.array(2)}


def _virtual_positions(args):
    """Two virtual positions in each of the first two examples, at different places; no others."""
    x = next((a for a in args if getattr(a, "ndim", 0) == 3), args[-1])  # or ids
    virtual_positions = np.full(x.shape[:2], -1)
    virtual_positions[0, :2] = virtual_positions[1, 1:3] = (0, 1)
    return {"virtual_positions": virtual_positions}


def _prompt(sites, dtype):
    return jp.prompt_tuning(2, sites.embedding or sites.match("table"), dtype=dtype)


def _p_tuning(sites, dtype):
    table = sites.embedding or sites.match("table")
    return jp.p_tuning(2, table, hidden=3, embed=4, dtype=dtype)


def _trainable_tokens(sites, dtype):
    return jp.trainable_tokens(range(1, 12), sites.embedding, dtype=dtype)


def _virtual_ids(args, sites):
    """The two virtual tokens in the first example, one of them in the second."""
    (table,) = (sites.embedding or sites.match("table")).values()
    first, second = jp.prompts.virtual_token_ids(table, 2)
    ids = args[-1].at[0, 1].set(second).at[0, 2].set(first).at[1, 4].set(second)
    return (*args[:-1], ids)


_LINEAR = ("linear",)

# Uses of a weight that one without a dense equivalent cannot follow, wherever it stands.
_DENSE_ONLY = {
    "a weight and its transpose in one layer": r"'w'.*dot_general",
    "contraction written backwards": r"'[wu]'.*dot_general",
    "weight sliced into parts before use": r"'(up|down)'.*slice",
    "weight split into parts before use": r"'qkv'.*split",
    "weights concatenated before use": r"'[qk]'.*concatenate",
    "kernels concatenated along outputs": r"'[qkv]'.*concatenate",
    "kernels stacked for one product": r"'(gate|up)'.*stack",
    "key and value kernels repeated for groups of heads": r"'[kv]'.*broadcast_in_dim",
    "kernels tiled": r"'up'.*tile",
    "kernels scaled along a side": r"'up'.*mul",
    "weight norm": r"'w'.*mul",
    "a weight under a non-linear operation": r"'w'.*tanh",
    "a rounded weight": r"'w'.*convert_element_type",
    "a weight times a weight": r"'[wu]'.*another weight",
    "a weight carried through a loop": r"'w'.*carried from step to step",
    "custom_vjp that halves the gradient": r"'(up|down)'.*derivative rule of the custom_vjp",
    "custom_jvp that scales the tangent": r"'(up|down)'.*derivative rule of the custom_jvp",
}
_PARTS = dict.fromkeys(
    (
        "shard_map, column- then row-parallel",
        "shard_map, column- then row-parallel, replication unchecked",
    ),
    r"'(up|down)'.*sharding that the weight cannot follow",
)
_TURNED = {"a bias subtracted, a bias times two": r"'(up|down)'.*subtracts or scales '\w+_bias'"}
_POSITIONS = r"prefix at '.*' was given virtual positions of shape"
_MISPLACED = {
    "layers with time before batch, as many of both": r"was given virtual positions of shape "
    r"\(4, 5\).*input has leading axes \(5, 4\)",
    "a pooler of the first position": r"output 0 of shape \(2, 19\) depends on a placeholder",
}

# With 4 outputs, a factor of rank 2 * 2 is as large as the weight.
_FOUR_OUTPUTS = (
    "all experts on all tokens",
    "all experts on all tokens, weighted before they are summed",
    "experts gathered for each token",
    "experts gathered under vmap",
    "convolution of joined kernels",
)

# Sides are prime, so a block is all of them: as large as a square weight, cut where that is.
_COARSE = (
    "a weight used twice in one layer",
    "tied head",
    "nnx Embed.attend",
    "linen Embed.attend",
    "linen LSTM under nn.RNN",
    "lax.scan over time with constant weights",
    "weight sliced into parts before use",
    "layers stacked, then scanned",
    "linen OptimizedLSTMCell under nn.RNN",
    *(name for name in _FOUR_OUTPUTS if "experts" in name),
)

# Rows in which a weight lies in parts, whose entries would need to know their positions in it.
_CUT = (
    *_PARTS,
    "shard_map with a gathered output",
    "shard_map, weights gathered by each device before use",
    "shard_map, layers scanned and gathered one by one",
    "weight sliced into parts before use",
    "weight split into parts before use",
    "kernels joined by heads, then split apart",
)

METHODS = [
    Method("lora", _lora),
    Method("ia3", lambda sites, dtype: jp.ia3(sites.linear, dtype=dtype), roles=_LINEAR),
    Method("ia3 on a part", _ia3_on_a_part, roles=_LINEAR, coarse=_CUT, rows=("x @ w",)),
    # A tile of scales in eight bits has 64 columns, more than the parts of these rows.
    Method(
        "lora on nf4",
        _lora_on_nf4,
        roles=_LINEAR,
        factored=False,
        keeps_base=False,
        coarse=_CUT,
    ),
    Method("dora", _dora, on_trained=False, rows=("x @ w", "lax.scan over layers")),
    Method("lora_fa", _lora_fa, roles=("linear", "conv"), rows=("x @ w",)),
    Method("adalora", _adalora, rows=("x @ w",)),
    Method("pissa", _pissa, keeps_base=False, on_trained=False, rows=("x @ w",)),
    Method("olora", _olora, keeps_base=False, on_trained=False, rows=("x @ w",)),
    Method("sparse", _sparse, factored=False, coarse=_CUT, rows=("x @ w",)),
    Method("lora under a mask", _under_a_mask, factored=False, keeps_base=False, rows=("x @ w",)),
    Method(
        "gates",
        _gates,
        roles=_LINEAR,
        rows=("x @ w", "a mesh with Explicit axes"),
        given=_inverse_temperature,
    ),
    Method(
        "gates of entries",
        _gated_entries,
        factored=False,
        coarse=_CUT,
        rows=("lax.scan over layers",),
        given=_inverse_temperature,
    ),
    Method("hira", _hira, factored=False, rows=("x @ w", "lax.scan over layers")),
    Method("vera", _vera, rows=("x @ w",), coarse=_FOUR_OUTPUTS),
    Method("loha", _loha, rows=("x @ w",), coarse=_FOUR_OUTPUTS),
    Method("lokr", _lokr, roles=("linear", "embedding"), rows=("x @ w",)),
    Method("miss", _miss, rows=("x @ w",)),
    Method("oft", _oft, roles=_LINEAR, rows=("x @ w", "lax.scan over layers"), coarse=_COARSE),
    Method("boft", _boft, roles=_LINEAR, rows=("x @ w",), coarse=_COARSE),
    Method("hra", _hra, rows=("x @ w",)),
    Method("road", _road, rows=("x @ w",), coarse=("convolution in one group per channel",)),
    Method(
        "bottleneck",
        _bottleneck,
        rows=("x @ w", "lax.scan of remat with a policy"),
        by_hand=by_hand.bottleneck,
        models=by_hand.FEED_FORWARD
        | by_hand.OTHER_PRODUCTS
        | by_hand.ATTENTION
        | by_hand.BATCH_ON_MESH
        | by_hand.EXPLICIT,
        refused=_DENSE_ONLY | _PARTS | _TURNED | {"jit inside": r"'up'.*dot_general"},
    ),
    Method(
        "parallel",
        _parallel,
        rows=("x @ w", "lax.scan over layers", "nnx Linear"),
        by_hand=by_hand.parallel,
        models=by_hand.FEED_FORWARD | by_hand.BATCH_ON_MESH | by_hand.EXPLICIT,
        refused=_PARTS | {"experts by vmap": r"'up'.*dot_general"},
    ),
    Method(
        "prefix",
        _prefix,
        rows=("(d, heads, head_dim) kernels", "lax.scan over layers"),
        by_hand=by_hand.prefix,
        models=by_hand.FEED_FORWARD | by_hand.ATTENTION,
        refused=_PARTS
        | _MISPLACED
        | _TURNED
        | dict.fromkeys(("experts by a batch axis", *by_hand.BATCH_ON_MESH), _POSITIONS),
        given=_virtual_positions,
    ),
    Method(
        "prompt",
        _prompt,
        rows=("table[ids]", "tied head"),
        by_hand=by_hand.prompt,
        models=by_hand.LOOKUPS,
        refused={
            "one-hot product": "uses 'table' as linear, one-hot",
            "ids clamped by the model": "look them up in 'table'",
            "take, wrapped": "look them up in 'table'",
        },
        args=_virtual_ids,
    ),
    Method(
        "bottleneck on the sum",
        _on_the_sum,
        rows=("lax.scan over layers", "post-norm layers, lax.scan"),
        by_hand=by_hand.on_the_sum,
        models=by_hand.RESIDUAL | by_hand.TRANSFORMER,
        refused={"x @ w": r"residual stream.*is read at 0 places"},
    ),
    Method(
        "encoded prefix",
        _encoded_prefix,
        rows=("(d, heads, head_dim) kernels", "lax.scan over layers"),
        by_hand=by_hand.encoded_prefix,
        models=by_hand.FEED_FORWARD | by_hand.ATTENTION,
        refused=_MISPLACED,
        given=_virtual_positions,
    ),
    Method(
        "p_tuning",
        _p_tuning,
        rows=("table[ids]", "tied head"),
        by_hand=by_hand.p_tuning,
        models=by_hand.LOOKUPS,
        args=_virtual_ids,
    ),
    Method(
        "trainable tokens",
        _trainable_tokens,
        roles=("embedding",),
        rows=("table[ids]", "tied head"),
    ),
    Method(
        "mam",
        _mam,
        rows=("post-norm layers, lax.scan",),
        by_hand=by_hand.mam,
        models=by_hand.TRANSFORMER,
        refused=_MISPLACED,
        given=_virtual_positions,
    ),
    Method(
        "unipelt",
        _unipelt,
        rows=("post-norm layers, lax.scan",),
        by_hand=by_hand.unipelt,
        models=by_hand.TRANSFORMER,
        refused=_MISPLACED,
        given=_virtual_positions,
    ),
    Method(
        "moelora",
        _moelora,
        rows=("x @ w",),
        by_hand=by_hand.moelora,
        models=by_hand.FEED_FORWARD | by_hand.ATTENTION,
        given=_one_task,
    ),
    Method(
        "poly",
        _poly,
        rows=("x @ w",),
        by_hand=by_hand.poly,
        models=by_hand.FEED_FORWARD | by_hand.ATTENTION,
        given=_one_task,
    ),
    Method(
        "xlora",
        _xlora,
        rows=("x @ w",),
        by_hand=by_hand.xlora,
        models={"x @ w": by_hand.FEED_FORWARD["x @ w"]},
        given=_experts,
    ),
]
