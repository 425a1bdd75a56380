"""Gates: numbers in [0, 1] that multiply groups of entries, trained until some of them are zero.

gates        the method: one logit for each group
openness     the expected share of open entries, for the loss
open_gates   masks of what is open at the end, for `prune`
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft.method import Method
from jaxpeft.methods.ia3 import ScaledIn, ScaledOut
from jaxpeft.methods.masks import Entrywise, Structure, block_of, spread
from jaxpeft.methods.oft import as_sharded
from jaxpeft.methods.placing import check_entries, check_whole, place, takes_sites
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Hole, Train
from jaxpeft.weight import IN, OUT, View, Weight, arrays, axes, base, dense, static, weight

#: Temperature and ends of the hard concrete distribution, those of the paper (section 4).
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1

#: Where gates may start, by kind. A hard concrete gate is clipped to 1 from sigmoid(logit) = 11/12
#: on; what is above leaves room for rounding, logits of 16 bits included.
_STARTS = {
    "hard concrete": (0.92, "0.92 <= start"),
    "sigmoid": (math.nextafter(0.5, 1), "0.5 < start"),
}


def gate_values(kind: str, logits: jax.Array, key: Any = None, sharpness: Any = None) -> jax.Array:
    """The gates of logits, drawn with a key or deterministic; at least float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if kind == "hard concrete":
        if key is not None:
            noise = jax.random.logistic(key, logits.shape, logits.dtype)  # log u - log(1 - u)
            logits = (logits + noise) / _BETA
        return jnp.clip(jax.nn.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA, 0, 1)
    if sharpness is None:
        return (logits > 0).astype(logits.dtype)
    return jax.nn.sigmoid(jnp.asarray(sharpness, logits.dtype) * logits)


def by_entry(gates: jax.Array, block: tuple[int, int]) -> jax.Array:
    """(..., in, out): the number of each block for all of its entries."""
    return jnp.repeat(jnp.repeat(gates, block[0], axis=-2), block[1], axis=-1)


@weight
class Weighed(Entrywise):
    """The matrix `w`, each block of it times a number of its own."""

    w: Any = base()
    gates: Any = axes("in", "out")  # (in / rows, out / columns)
    block: tuple[int, int] = static((1, 1))

    def grain(self, field, axis):
        return self.block[(IN, OUT).index(axis)], 1

    def changes(self):
        return {"gates": self.gates}, lambda matrix, gates: matrix * by_entry(gates, self.block)

    def lookup(self, ids):
        """w[ids] * gates[ids]."""
        rows = self.w[ids]
        gates = jnp.repeat(self.gates[ids // self.block[0]], self.block[1], axis=-1)
        return self.changed(rows, ids, rows * (gates - 1), self.gates.site)


@weight
class WeighedRows(ScaledIn):
    """The matrix `scale[:, None] * w`, which may be a table that is read by row."""

    def lookup(self, ids):
        """w[ids] * scale[ids]."""
        rows = self.w[ids]
        return self.changed(rows, ids, rows * (self.scale[ids] - 1), self.scale.site)


@weight
class Gated(Weight):
    """The matrix `w * z`, with a gate z of its own for each block of entries.

    hard concrete:  z = clip(1.2 sigmoid(s) - 0.1, 0, 1), s the logit, or with a key of the call
                    s = (log u - log(1 - u) + logit) / beta, u uniform
    sigmoid:        z = sigmoid(sharpness * logit), or without a sharpness whether logit > 0

    Gates of whole outputs scale what comes out of a product, those of whole inputs what goes in;
    else the matrix is formed where it is used, and again in the backward pass.
    """

    w: Any = base()
    logits: Any = axes("group")  # blocks, row by row
    sharpness: Any = arrays()  # a number or nothing
    key: Any = axes(optional=True)
    kind: str = static("hard concrete")
    block: tuple[int, int] = static((1, 1))
    sides: tuple[int, int] = static((1, 1))
    scales: str | None = static(None)  # "in" or "out" where gates are those of a whole side

    def derived(self):
        key = None if self.key is None else self.key.array
        gates = gate_values(self.kind, self.logits.array, key, self.sharpness)
        rows, columns = self.block
        if self.scales == OUT:
            return {"gates": jnp.repeat(gates, columns)}
        if self.scales == IN:
            return {"gates": jnp.repeat(gates, rows)}
        return {"gates": self._by_block(gates)}

    def acting(self, **derived):
        gates = derived["gates"]
        if self.scales == OUT:
            return ScaledOut(self.w, gates)
        if self.scales == IN:
            return WeighedRows(self.w, gates)
        return Weighed(self.w, gates, self.block)

    def materialize(self):
        def weighed(w: jax.Array, logits: jax.Array) -> jax.Array:
            gates = gate_values(self.kind, logits, self.key, self.sharpness)
            return w * by_entry(self._by_block(gates), self.block)

        return as_sharded(weighed, dense(self.w), self.logits)

    def _by_block(self, gates: jax.Array) -> jax.Array:
        (n, m), (rows, columns) = self.sides, self.block
        return gates.reshape(n // rows, m // columns)


@takes_sites
def gates(
    sites: Sites,
    *,
    kind: Literal["hard concrete", "sigmoid"] = "hard concrete",
    structure: Structure = "entry",
    start: float = 0.95,
    dtype: Any = jnp.float32,
) -> Method:
    """Learned gates: numbers in [0, 1] on groups of entries, of which training closes some.

    Each selected matrix becomes `w * z`, with one gate z and one trained logit for each group. The
    matrix under it stays frozen, or is what another method in the `chain` makes of it; biases stay
    as they are. Gates close where the loss asks for it: add a multiple of `openness`. At the end
    `merge` multiplies the gates in, or `prune(open_gates(...))` leaves out what they closed.

    "hard concrete": z = clip(1.2 sigmoid(s) - 0.1, 0, 1). A call with a key, `combine(frozen,
    adapter, gates=key)`, draws s = (log u - log(1 - u) + logit) / (2/3), u uniform in (0, 1), anew
    for each weight and layer: gates are exactly 0 or 1 much of the time, and yet the loss has a
    gradient. Without a key s = logit. A clipped gate has no gradient then, so train with keys. A
    trained gate may stay strictly between 0 and 1: merging keeps it multiplied in, `open_gates`
    counts it as open.

    "sigmoid": z = sigmoid(sharpness * logit), the sharpness a value of the call, `combine(frozen,
    adapter, sharpness=number)`, which grows from 1 to about 200 in training: the schedule
    `optax.exponential_decay(1.0, steps, 200.0)`. Without a sharpness z is 1 where logit > 0, else
    0, which has no gradient.

    Both compute the base model exactly at the start where the call has neither key nor sharpness.

    Args:
      sites: The matrices.
      kind: Of the gates.
      structure: What a gate multiplies: see `keep`. A head is `(None, head_dim)` where it makes
        outputs, `(head_dim, None)` where it is read.
      start: sigmoid(logit) where training starts, below 1: from 0.92 on for "hard concrete", whose
        gates are then clipped to 1, and above 0.5 for "sigmoid".
      dtype: Of the logits.

    Returns:
      A method with one trained number for each group, under "<path>/gates/<structure>" in the
      adapter. Gates of whole inputs or outputs cost no more than `ia3`; with others the matrix is
      formed where it is used, and again in the backward pass.

    Raises:
      ValueError: An unknown kind or structure, a start out of range, blocks that do not divide a
        matrix, nothing selected, a part of the outputs, or gates of entries or blocks over a
        method whose weight is no matrix; names the weight.

    References:
      Louizos et al., Learning Sparse Neural Networks through L0 Regularization, 2018, sections 2.2
      to 2.4 and 4. https://arxiv.org/abs/1712.01312
      Savarese et al., Winning the Lottery with Continuous Sparsification, 2020, section 3.
      https://arxiv.org/abs/1912.04427
    """
    if kind not in _STARTS:
        raise ValueError(f"`gates(kind='{kind}')`: choose {' or '.join(map(repr, _STARTS))}.")
    least, rule = _STARTS[kind]
    if not least <= start < 1:
        raise ValueError(
            f"`gates(kind='{kind}', start={start})`: {rule} < 1 is needed, so that every gate is "
            "open and training starts at the base model."
        )
    check_whole("gates", sites)
    blocks = {path: block_of(structure, site) for path, site in sites.items()}
    logit = math.log(start / (1 - start))

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        sides, block = (site.size(IN), site.size(OUT)), blocks[site.path]
        scales = _side(site, block)
        if scales is None:
            check_entries(f"gates(structure={structure!r})", site, view)
        name = _name(site.path, structure)
        logits = jnp.full((*site.stack, _groups(sides, block)), logit, dtype)
        drawn = sharpness = None
        if kind == "sigmoid":
            sharpness = Hole("sharpness", optional=True)
        else:
            own = zlib.crc32(name.encode())
            drawn = Hole("gates", optional=True, fold=own, stack=site.stack)
        gated = Gated(
            view.weight, Train(logits, name=name), sharpness, drawn, kind, block, sides, scales
        )
        return dataclasses.replace(view, weight=gated)

    return Method(
        "gates",
        dict(sites=sites, kind=kind, structure=structure, start=start, dtype=dtype),
        lambda key, tree: place(key, tree, sites, make, who="gates"),
    )


def _side(site: Site, block: tuple[int, int]) -> str | None:
    """The side on which gates can be a scale: that of whole outputs, or of whole inputs."""
    if block[0] == site.size(IN):
        return OUT
    # An input of a convolution is one of its window, and no channel of the activation.
    return IN if block[1] == site.size(OUT) and "conv" not in site.kinds else None


def _groups(sides: tuple[int, int], block: tuple[int, int]) -> int:
    return (sides[0] // block[0]) * (sides[1] // block[1])


def _name(path: str, structure: Any) -> str:
    """What the adapter calls the logits: gates of two structures may stand on one weight."""
    if not isinstance(structure, str):
        structure = "x".join("all" if size is None else str(size) for size in structure)
    return f"{path}/gates/{structure}"


@takes_sites
def open_gates(
    method: Method, adapter: Mapping[str, Any], sites: Sites | None = None
) -> dict[str, jax.Array]:
    """Masks of the entries whose gates are open without a key or a sharpness: z > 0.

    Args:
      method: From `gates`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.
      sites: Those wanted, of the method's; `None` for all.

    Returns:
      {path: bools of the weight's shape}, ready for `prune`.

    Raises:
      ValueError: It is another method, the adapter lacks logits, or a site has no gates; names it.
    """
    options = _options(method, "open_gates")
    chosen: Sites = options["sites"]
    if sites is not None:
        if missing := [path for path in sites if path not in chosen]:
            raise ValueError(
                f"`open_gates`: {missing} have no gates of this method, which has them at "
                f"{list(chosen)}."
            )
        chosen = chosen & sites
    masks = {}
    for path, site in chosen.items():
        rows, columns = block_of(options["structure"], site)
        is_open = gate_values(options["kind"], _logits(method, adapter, path)) > 0
        groups = is_open.reshape(-1, site.size(IN) // rows, site.size(OUT) // columns)
        masks[path] = spread(groups, site, options["structure"])
    return masks


def openness(method: Method, adapter: Mapping[str, Any], sharpness: Any = None) -> jax.Array:
    """The expected share of entries whose gates are open, for the loss.

    Each group counts with its entries: sum_g entries_g p_g / sum_g entries_g, with

        p = sigmoid(logit - 2/3 log(0.1 / 1.1))    "hard concrete": the probability that z > 0
        p = sigmoid(sharpness * logit)             "sigmoid"; whether logit > 0 without a sharpness

    Args:
      method: From `gates`; of a chain, that method of it.
      adapter: Maybe with arrays of other methods.
      sharpness: That of the call, for "sigmoid"; `None` gives the share at inference, which has
        no gradient.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: It is another method, the adapter lacks logits, or hard concrete gates are given
        a sharpness.
    """
    options = _options(method, "openness")
    kind, sites = options["kind"], options["sites"]
    if sharpness is not None and kind == "hard concrete":
        raise ValueError(
            f"`openness(sharpness={sharpness})`: gates of kind 'hard concrete' have no sharpness. "
            "Leave it out; their openness is that of the calls with a key."
        )
    total = sum(math.prod(site.shape) for site in sites.values())
    share = jnp.zeros((), jnp.float32)
    for path, site in sites.items():
        logits = _logits(method, adapter, path)
        if kind == "hard concrete":
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            p = jax.nn.sigmoid(logits - _BETA * math.log(-_GAMMA / _ZETA))
        else:
            p = gate_values(kind, logits, sharpness=sharpness)
        share = share + math.prod(site.shape) / total * jnp.mean(p)  # groups of a weight are equal
    return share


def _options(method: Any, who: str) -> Mapping[str, Any]:
    name = method.name if isinstance(method, Method) else repr(method)
    if name != "gates":
        raise ValueError(
            f"`{who}` takes the method that `gates` made; this one is '{name}'. Of a chain, give "
            "the gates alone, with the whole adapter."
        )
    return method.options


def _logits(method: Method, adapter: Mapping[str, Any], path: str) -> jax.Array:
    name = _name(path, method.options["structure"])
    if name not in adapter:
        raise ValueError(
            f"The adapter has no '{name}', the logits of the gates at '{path}'. It has "
            f"{sorted(adapter)}. Was it trained with another structure?"
        )
    return jnp.asarray(adapter[name])
