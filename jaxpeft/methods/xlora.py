"""X-LoRA: LoRA adapters that are trained already, side by side, and gates that weigh them."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.method import Method
from jaxpeft.methods.lora import lora
from jaxpeft.methods.mixtures import Given
from jaxpeft.methods.placing import check_whole, place, takes_sites
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Expected, Hole, Train
from jaxpeft.weight import IN, OUT, View, Weight, axes, base, static, weight

READS = ("hidden", "input")


@weight
class Gated(Weight):
    """x @ w + ((x @ a) * share) @ b: expert i has the next ranks[i] columns of `a`.

    share = softmax((h @ gate + bias) / temperature), of hidden states h that the call gives.
    """

    w: Any = base()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("width", "expert")
    bias: Any = axes("expert")
    hidden: Any = axes(shared=True)  # (*lead, width)
    ranks: tuple[int, ...] = static()
    temperature: float = static(1.0)
    top: int | None = static(None)
    path: str = static("")

    is_matrix = False
    local_in = local_out = True

    def forward(self, x):
        """x @ w + ((x @ a) * share) @ b."""
        return x @ self.w + self._weighed(x @ self.a) @ self.b

    def transposed(self, y):
        """y @ w.T + ((y @ b.T) * share) @ a.T."""
        return y @ self.w.T + self._weighed(y @ self.b.T) @ self.a.T

    def lookup(self, ids):
        """w[ids] + (a[ids] * share) @ b."""
        return self.changed(self.w[ids], ids, self._weighed(self.a[ids]) @ self.b, self.a.site)

    def _weighed(self, low):
        # As a plain array: where the program sorts its tokens by experts of its own, no row of h
        # belongs to a token, and there is no such array.
        gate, h = self.gate.matrix, self.hidden.array
        lead = h.shape[:-1]
        if h.shape[-1:] != gate.shape[:1] or low.shape[:-1][: len(lead)] != lead:
            raise ValueError(
                f"The gate at '{self.path}' reads a width of {gate.shape[0]} and is given hidden "
                f"states {h.shape} (*lead, width), but its input leads with {low.shape[:-1]}: "
                "`lead` should be nothing, (batch,), or (batch, tokens), as this product has them. "
                "If the model merges or moves them, lift it over one example and use `jax.vmap`."
            )
        shares = gate_shares(h @ gate + self.bias.matrix, self.temperature, self.top)
        shares = shares.reshape(*lead, *(1,) * (low.ndim - len(lead)), -1)
        return _weighed(low, shares, self)


@weight
class GatedByInput(Weight):
    """x @ w + ((x @ a) * share) @ b, with share = softmax((x @ gate + bias) / temperature)."""

    w: Any = base()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("in", "expert")
    bias: Any = axes("expert")
    ranks: tuple[int, ...] = static()
    temperature: float = static(1.0)
    top: int | None = static(None)
    path: str = static("")

    is_matrix = False
    local_out = True  # not on a part of `in`: shares of partial sums are not parts of shares

    def forward(self, x):
        logits = x @ self.gate + self.bias
        logits = logits.reshape(*logits.shape[:-1], -1, len(self.ranks))
        shares = gate_shares(logits, self.temperature, self.top)
        return x @ self.w + _weighed(x @ self.a, shares, self) @ self.b


def _weighed(low: jax.Array, shares: jax.Array, w: Any) -> jax.Array:
    """low (..., columns), each times the share (..., groups or 1, experts) of its expert.

    A convolution in groups has the columns once for each of them.
    """
    owner = np.repeat(np.arange(len(w.ranks)), w.ranks)
    grouped = low.reshape(*low.shape[:-1], -1, len(owner))
    return (grouped * shares[..., owner]).reshape(low.shape)


def gate_shares(logits: jax.Array, temperature: float = 1.0, top: int | None = None) -> jax.Array:
    """softmax(logits / temperature) over the last axis, at least in float32.

    Args:
      logits: (..., experts).
      temperature: The lower, the more of the whole goes to the largest.
      top: Only so many of the largest get a share; those as large as the last of them get one
        too, so that equal logits have equal shares. `None` for all.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    if top is not None:
        last = jax.lax.top_k(logits, top)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return jax.nn.softmax(logits, axis=-1)


# The bank ----------------------------------------------------------------------------------------


class Bank(NamedTuple):
    """Several LoRA adapters side by side.

    Attributes:
      arrays: {"<path>/experts/a": (*stack, in, sum of ranks), "<path>/experts/b": (*stack, sum of
        ranks, out)}, for `combine`.
      sites: All weights that any of them adapts.
      ranks: {path: rank of each expert there}, 0 where it does not adapt the weight.
    """

    arrays: dict[str, jax.Array]
    sites: Sites
    ranks: dict[str, list[int]]


def bank(adapters: Sequence[tuple[Method, Mapping[str, Any]]]) -> Bank:
    """LoRA adapters of one base as the experts of `xlora`, in this order.

    At each weight the factors lie side by side, with each adapter's strength s in its `b`:
    [a_1, a_2] and [s_1 b_1; s_2 b_2]. Ranks, strengths and weights may differ.

    Args:
      adapters: The method, from `lora`, and the trained arrays of each; as `load_adapter` gives
        them, or of a `chain`, the `lora` in it.

    Raises:
      ValueError: Fewer than two, a method that is not `lora` or acts on a part of the columns,
        arrays that are missing, too many or of another shape than the method makes, or weights
        of different bases; names the adapter by its number and the path.
    """
    if len(adapters) < 2:
        raise ValueError(
            f"`bank` got {len(adapters)} adapters. It takes two or more: a single one has the "
            "whole share always."
        )
    experts = [_expert(i, method, adapter) for i, (method, adapter) in enumerate(adapters)]
    known: dict[str, tuple[int, Site]] = {}
    for i, (method, _) in enumerate(adapters):
        for path, site in method.options["sites"].items():
            first, other = known.setdefault(path, (i, site))
            if _layout(site) != _layout(other):
                raise ValueError(
                    f"`bank`: '{path}' is {_layout(other)} (shape, stack, in, out, roles) in "
                    f"adapter {first}, but {_layout(site)} in adapter {i}. They were trained on "
                    "different bases, and have no common one to be weighed on."
                )
    sites = functools.reduce(operator.or_, (method.options["sites"] for method, _ in adapters))
    arrays, ranks = {}, {}
    for path in sites:
        acting = [expert[path] for expert in experts if path in expert]
        arrays[f"{path}/experts/a"] = jnp.concatenate([a for a, _ in acting], axis=-1)
        arrays[f"{path}/experts/b"] = jnp.concatenate([b for _, b in acting], axis=-2)
        ranks[path] = [e[path][0].shape[-1] if path in e else 0 for e in experts]
    return Bank(arrays, sites, ranks)


def _layout(site: Site) -> tuple:
    roles = tuple(dict.fromkeys(axis.role for axis in site.axes))
    return site.shape, site.stack, site.size(IN), site.size(OUT), roles


def _expert(i: int, method: Any, adapter: Mapping[str, Any]) -> dict[str, tuple]:
    """{path: (a, s * b)} of adapter i.

    Raises:
      ValueError: It is none of `lora`, or the arrays are not its own.
    """
    if getattr(method, "name", None) != "lora":
        raise ValueError(
            f"`bank` takes adapters of `lora`; adapter {i} is of "
            f"'{getattr(method, 'name', method)}'. Of a chain, give the `lora` in it."
        )
    sites: Sites = method.options["sites"]
    check_whole("bank", sites)
    like = {path: jax.ShapeDtypeStruct(site.shape, jnp.float32) for path, site in sites.items()}
    made = jax.eval_shape(method.apply, jax.random.key(0), like)
    lows = {path: view.weight for path, view in made.items()}
    wanted = {f"{path}/{name}": getattr(low, name) for path, low in lows.items() for name in "ab"}
    for name in sorted({*wanted, *adapter}):
        want = tuple(wanted[name].shape) if name in wanted else None
        have = tuple(adapter[name].shape) if name in adapter else None
        if have != want:
            raise ValueError(
                f"`bank`: '{name}' of adapter {i} has shape {have}, but its method makes {want}. "
                "Give each adapter with the method that made it."
            )
    found = {}
    for path, low in lows.items():
        a, b = (jnp.asarray(adapter[f"{path}/{name}"]) for name in "ab")
        found[path] = (a, low.scale * b)
    return found


# The method --------------------------------------------------------------------------------------


@takes_sites
def xlora(
    sites: Sites,
    ranks: Mapping[str, Sequence[int]],
    *,
    width: int | None = None,
    reads: Literal["hidden", "input"] = "hidden",
    temperature: float = 1.0,
    top: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """X-LoRA: frozen LoRA adapters, weighed at every weight and layer by trained gates.

    Each matrix w of a bank gives y = x @ w + sum_i share_i * s_i * x @ a_i @ b_i, with

        share = softmax((h @ gate + bias) / temperature).

    h are hidden states that the call gives: (width,) for one decision, (batch, width) for one of
    each example, (batch, tokens, width) for one of each token; the axes before the width are the
    first of the input of every weight. In the paper they are the last hidden states of a pass
    without adapters. Or the gate reads x itself, in the same pass.

    Gates start at zero, so that all experts have equal shares: training starts at the base plus
    the mean of the experts' changes. An expert that does not adapt a weight keeps its share there,
    for no change. The experts are no part of the adapter: give them by the call.

    Args:
      sites, ranks: Those of the `bank`.
      width: Of h. `None` where the gates read "input".
      reads: "hidden" for h; "input" for x, at weights that are used as a product with it.
      temperature: The lower, the more of the whole goes to one expert.
      top: Only the largest so many shares of each token count, and are scaled up to a sum of one;
        those equal to the last of them count too. `None` for all.
      dtype: Of the gates.

    Returns:
      A method with (width + 1) * experts trained numbers per matrix, or (in + 1) * experts.

    Raises:
      ValueError: Ranks that do not belong to the sites or of fewer than two experts, a width below
        one or one that is not needed, an unknown `reads`, a temperature that is not positive, a
        `top` out of range, or a part of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> from jaxpeft.methods.xlora import bank, xlora
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> key, method = jax.random.key(0), jp.lora(2, jp.sites(f, params, jnp.ones((1, 8))))
      >>> experts = bank([(method, jp.split(method(key, params))[1]) for _ in range(3)])
      >>> gates = xlora(experts.sites, experts.ranks, width=5)
      >>> frozen, adapter = jp.split(gates(key, params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/experts/gate': (5, 3), 'w/experts/bias': (3,)}
      >>> tree = jp.combine(frozen, {**experts.arrays, **adapter}, hidden=jnp.ones((1, 5)))
      >>> jp.lift(f)(tree, jnp.ones((1, 8))).shape
      (1, 4)

    References:
      Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for
      Large Language Models with Applications in Protein Mechanics and Molecular Design, 2024,
      section 2. https://arxiv.org/abs/2402.07148
    """
    check_whole("xlora", sites)
    experts = _check_ranks(sites, ranks)
    if reads not in READS:
        raise ValueError(f"`xlora(reads='{reads}')`: choose 'hidden' or 'input'.")
    if reads == "hidden" and (width is None or width < 1):
        raise ValueError(
            f"`xlora(width={width}, reads='hidden')`: give the width of the hidden states, at "
            "least 1."
        )
    if reads == "input" and width is not None:
        raise ValueError(
            f"`xlora(width={width}, reads='input')`: a gate is as wide as its weight's input. "
            "Leave `width` out."
        )
    if not temperature > 0:
        raise ValueError(f"`xlora(temperature={temperature})`: a positive number is needed.")
    if top is not None and not 1 <= top <= experts:
        raise ValueError(f"`xlora(top={top})`: there are {experts} experts; choose 1 to {experts}.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        n = site.size(IN) if width is None else width
        columns, sides = sum(ranks[site.path]), (site.size(IN), site.size(OUT))
        a, b = (*site.stack, sides[0], columns), (*site.stack, columns, sides[1])
        # With names of their own: those of a LoRA on top of this weight would be the same.
        at = f"{site.path}/experts"
        way = f"Its experts have ranks {ranks[site.path]} there: give the arrays of the same bank."
        fields: dict[str, Any] = dict(
            a=Hole(f"{at}/a", expects=Expected(a, "floating", method="xlora", way=way)),
            b=Hole(f"{at}/b", expects=Expected(b, "floating", method="xlora", way=way)),
            gate=Train(jnp.zeros((*site.stack, n, experts), dtype), name=f"{at}/gate"),
            bias=Train(jnp.zeros((*site.stack, experts), dtype), name=f"{at}/bias"),
            ranks=tuple(ranks[site.path]),
            temperature=temperature,
            top=top,
            path=site.path,
        )
        gated: Weight
        if reads == "input":
            gated = GatedByInput(view.weight, **fields)
        else:
            gated = Gated(view.weight, **fields, hidden=Given("hidden"))
        return dataclasses.replace(view, weight=gated)

    options = dict(
        sites=sites,
        ranks={path: list(ranks[path]) for path in sites},
        width=width,
        reads=reads,
        temperature=temperature,
        top=top,
        dtype=dtype,
    )
    return Method("xlora", options, lambda key, tree: place(key, tree, sites, make, who="xlora"))


def _check_ranks(sites: Sites, ranks: Mapping[str, Sequence[int]]) -> int:
    """How many experts there are.

    Raises:
      ValueError: Ranks are missing, unknown, negative or all zero, or of a different number or
        fewer than two.
    """
    if missing := sorted(set(sites) ^ set(ranks)):
        raise ValueError(
            f"`xlora`: the sites are {list(sites)}, and the ranks those of {list(ranks)}; "
            f"{missing} stand in one of them only. Give the sites and ranks of one bank."
        )
    for path, own in ranks.items():
        experts = len(next(iter(ranks.values())))
        if len(own) != experts or experts < 2 or min(own) < 0 or max(own) < 1:
            raise ValueError(
                f"`xlora`: the ranks of '{path}' are {list(own)}. There should be one for each of "
                f"two or more experts, as many at every weight (here {experts}), none of them "
                "negative and one of them positive. `bank` makes them."
            )
    return len(next(iter(ranks.values()), ()))


def for_shares(bank: Bank, shares: Sequence[float]) -> tuple[Method, dict[str, jax.Array]]:
    """What the experts of a bank are with fixed shares, as plain LoRA, which merges.

    Args:
      bank: From `bank`.
      shares: A number for each expert, for all weights. Those with zero take no columns.

    Returns:
      The method, for the original params, and its adapter.

    Raises:
      ValueError: Another number of shares than of experts, all of them zero, or more columns at a
        weight than its smaller side, which is the largest rank that `lora` takes.
    """
    count = len(next(iter(bank.ranks.values())))
    share = np.asarray(shares, float)
    if share.shape != (count,) or not share.any():
        raise ValueError(
            f"`for_shares(shares={share.tolist()})`: give one number for each of {count} experts, "
            "not all of them zero."
        )
    plain, ranks = {}, {}
    for path, site in bank.sites.items():
        columns = np.repeat(share, bank.ranks[path])
        kept = np.flatnonzero(columns)
        if len(kept) > min(site.size(IN), site.size(OUT)):
            raise ValueError(
                f"`for_shares`: the experts have {len(kept)} columns at '{path}', which is "
                f"{site.size(IN)} x {site.size(OUT)}. Give fewer of them a share."
            )
        if len(kept):
            a, b = (bank.arrays[f"{path}/experts/{name}"] for name in "ab")
            ranks[path] = len(kept)
            plain[f"{path}/a"] = a[..., kept]
            plain[f"{path}/b"] = b[..., kept, :] * jnp.asarray(columns[kept, None], b.dtype)
    sites = bank.sites.match(lambda site: site.path in ranks)
    return lora(ranks, sites, dtype=next(iter(plain.values())).dtype), plain
