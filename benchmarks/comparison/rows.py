"""The methods: how each is made on both models, and the rates it is swept over."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from comparison.places import Places
from jaxpeft import optim
from jaxpeft._marks import Placeholder

RANK = 8
VERA_RANK = 256  # of matrices that are not trained
BLOCK = 4  # of a rotation
EXPERTS = 4  # of a mixture
ENTRIES = 0.02  # share of entries that is trained, about as many as LoRA's
VIRTUAL = 20  # virtual tokens, where they are all there is


@dataclasses.dataclass(frozen=True)
class Family:
    """Methods that are trained at rates of one size.

    Attributes:
      centre: The middle of the three rates.
      source: Where it is from. The papers train for thousands of steps, so where they name a
        range its upper end is taken, and where that was found in shorter training a higher one.
    """

    centre: float
    source: str

    @property
    def rates(self) -> tuple[float, float, float]:
        """Three rates, a factor of three apart."""
        return self.centre / 3, self.centre, self.centre * 3


FAMILIES = {
    "head": Family(0.0, "the head's own rate; nothing is swept"),
    "weights": Family(1.5e-4, "Devlin et al. 2019, A.3: up to 5e-5, for ten times the steps"),
    "biases": Family(1e-3, "Ben Zaken et al. 2021: 1e-4 to 1e-3"),
    "low rank": Family(1.5e-3, "Hu et al. 2021: 4e-4 to 5e-4, ten times that of all weights"),
    "scales": Family(1e-2, "Liu et al. 2022 (IA3): 3e-3"),
    "adapters": Family(1e-3, "Houlsby et al. 2019: 3e-5 to 3e-3"),
    "prompts": Family(3e-2, "Lester et al. 2021: 0.3 with Adafactor, relative to the rows"),
    "prompt networks": Family(1e-3, "as adapters: P-tuning's own 1e-5 is for the base with it"),
    "prefix networks": Family(1e-3, "Li and Liang 2021: 5e-5; He et al. 2021: 5e-5 to 1e-4"),
    "deep prompts": Family(1e-2, "Liu et al. 2021 (P-tuning v2): 1e-2 on RTE, 3e-2 on CoNLL03"),
    "vectors": Family(1e-2, "Kopiczko et al. 2023 (VeRA): 4e-3 to 1e-2; Liao et al. 2024: 1e-3"),
    "rotations": Family(3e-3, "Liu et al. 2023 (BOFT): 2e-4 to 1e-3, for ten times the steps"),
    "entries": Family(1e-3, "Bhardwaj et al. 2024 (SHiRA): as LoRA's, 2e-4 to 5e-4"),
    "hybrids": Family(1e-3, "Mao et al. 2022 (UniPELT): 1e-4 to 5e-4 by part"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method of the table.

    Attributes:
      name: As in the results.
      paper: Whose method it is.
      family: Its rates, of FAMILIES.
      make: From the places of a model, and what it `needs`, to the method, without the head.
      length: Virtual positions in front of the input.
      swept: Tasks with a sweep of its rates; on others with one, its family's centre is taken.
      virtual: What stands there: "ids" beyond the table, or placeholders at "virtual_positions".
      decoder: Why it has no row on the decoder; `None` where it has one.
      rate_of: Another row whose rate it takes, instead of a sweep of its own.
      wrap: From the adapter's optimizer, the places and the steps to what it is trained with.
      penalty: Of the adapter, added to the mean loss.
      longer: How many times as many steps as the others it is trained.
      needs: What it is told of the task's own batches before it is trained: second moments of the
        inputs of the kernels, or gradients of the kernels.
    """

    name: str
    paper: str
    family: str
    make: Callable[..., Any] | None
    length: int = 0
    virtual: Literal["ids", "virtual_positions"] = "ids"
    swept: tuple[str, ...] = ("snips", "e2e")
    decoder: str | None = None
    rate_of: str | None = None
    wrap: Callable[[Any, Places, int], Any] | None = None
    penalty: Callable[[Any], Any] | None = None
    longer: int = 1
    needs: Literal["moments", "gradients"] | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """Those of its family; the probe has none."""
        return () if self.make is None else FAMILIES[self.family].rates


def _houlsby(p: Places) -> Any:
    adapters = jp.bottleneck_adapter(
        p.width, p.attended | p.outputs, activation="gelu", init="normal"
    )
    return jp.chain(adapters, jp.norm_tuning(p.norms))


def _pfeiffer(p: Places) -> Any:
    return jp.bottleneck_adapter(
        p.width, p.outputs, adapter_input="output_plus_residual", norms=p.summed, eps=p.eps
    )


def _mam(p: Places) -> Any:
    return jp.mam(VIRTUAL, p.width, p.keys, p.values, p.inputs, p.outputs, hidden=256)


def _unipelt(p: Places) -> Any:
    at = (p.queries | p.values, p.keys, p.values, p.outputs)
    return jp.unipelt(*at, rank=RANK, length=10, bottleneck_dim=p.width, norms=p.summed, eps=p.eps)


#: Deviation of the entries of stories260k's table; a random prompt starts at 0.02 unless told.
WORD = 0.31
_TEXT = "This is a place to eat. It has good food and it is near the river."


def _input(length: int, start: str) -> Row:
    """A prompt at the embedding."""

    def make(p: Places) -> Any:
        if start == "text":
            return jp.prompt_tuning(length, p.table, init_text=_TEXT, tokenizer=p.tokenizer)
        if start == "random words":
            return jp.prompt_tuning(length, p.table, init_std=WORD)
        return jp.prompt_tuning(length, p.table, init=start)  # type: ignore[arg-type]

    return Row(f"input {length}, {start}", "Lester et al. 2021", "prompts", make, length=length)


PROBE = Row("probe", "the head alone", "head", None)
FULL = Row("full", "full fine-tuning", "weights", lambda p: jp.full_finetuning(p.sites))
ROWS = [
    PROBE,
    FULL,
    Row(
        "bitfit",
        "Ben Zaken et al. 2021",
        "biases",
        lambda p: jp.bitfit(p.sites),
        decoder="the decoder of this benchmark has no biases",
    ),
    Row("lora", "Hu et al. 2021", "low rank", lambda p: jp.lora(RANK, p.kernels, alpha=2 * RANK)),
    Row("ia3", "Liu et al. 2022", "scales", lambda p: jp.ia3(p.keys | p.values, p.outputs)),
    Row("houlsby", "Houlsby et al. 2019", "adapters", _houlsby),
    Row("pfeiffer", "Pfeiffer et al. 2021", "adapters", _pfeiffer),
    Row(
        "parallel",
        "He et al. 2021",
        "adapters",
        lambda p: jp.parallel_adapter(p.width, p.inputs, p.outputs, scale=4.0),
    ),
    Row(
        "prompt",
        "Lester et al. 2021",
        "prompts",
        lambda p: jp.prompt_tuning(VIRTUAL, p.table, init="vocabulary"),
        length=VIRTUAL,
    ),
    Row(
        "p-tuning",
        "Liu et al. 2021",
        "prompt networks",
        lambda p: jp.p_tuning(VIRTUAL, p.table, hidden=128),
        length=VIRTUAL,
    ),
    Row(
        "prefix",
        "Li and Liang 2021",
        "prefix networks",
        lambda p: jp.prefix_tuning(VIRTUAL, p.keys, p.values, hidden=256),
        length=VIRTUAL,
        virtual="virtual_positions",
    ),
    Row(
        "p-tuning v2",
        "Liu et al. 2021",
        "deep prompts",
        lambda p: jp.prefix_tuning(VIRTUAL, p.keys, p.values),
        length=VIRTUAL,
        virtual="virtual_positions",
    ),
    Row("mam", "He et al. 2021", "hybrids", _mam, length=VIRTUAL, virtual="virtual_positions"),
    Row("unipelt", "Mao et al. 2022", "hybrids", _unipelt, length=10, virtual="virtual_positions"),
]


def _descendant(
    name: str,
    paper: str,
    make: Callable[..., Any],
    family: str,
    decoder: str | None = None,
    **own: Any,
) -> Row:
    return Row(name, paper, family, make, decoder=decoder, swept=("snips",), **own)


def _faster(tx: Any, p: Places, steps: int) -> Any:
    """The factors `b` at LoRA+'s multiple of the rate."""
    del steps
    empty = lambda: {path: jnp.zeros(site.shape) for path, site in p.kernels.items()}  # noqa: E731
    method = jp.lora(RANK, p.kernels)
    frozen, _ = jax.eval_shape(lambda: jp.split(method(jax.random.key(0), empty())))
    return optim.lora_plus(lambda rate: optax.chain(tx, optax.scale(rate)), 1.0, frozen, p.sites)


def _of_one_task(mixture: Any) -> Any:
    """A mixture that is told once and for all of the one task that there is here."""

    def fill(x: Any) -> Any:
        return x.fill(0) if isinstance(x, Placeholder) and x.name == "task" else x

    def method(key: jax.Array, tree: Any) -> Any:
        return jax.tree.map(fill, mixture(key, tree), is_leaf=lambda x: isinstance(x, Placeholder))

    return method


def adalora(rank: int) -> Row:
    """AdaLoRA with this rank on average in the end, from half as much again."""

    def make(p: Places) -> Any:
        return jp.adalora(3 * rank // 2, p.kernels, alpha=3 * rank)

    def wrap(tx: Any, p: Places, steps: int) -> Any:
        matrices = sum(int(np.prod(site.stack)) for site in p.kernels.values())
        tenth, third = steps // 10, steps // 3
        return optim.rank_allocator(
            tx,
            rank * matrices,
            total_steps=steps,
            warmup_steps=tenth,
            final_steps=third,
            update_every=5,
        )

    def penalty(adapter: Any) -> Any:
        return 0.1 * jp.adapters.orthogonality_penalty(adapter)

    paper, own = "Zhang et al. 2023", dict(wrap=wrap, penalty=penalty)
    return _descendant("adalora", paper, make, "low rank", **own)


#: LoRA's descendants, rotations, sparse subnetworks and mixtures.
DESCENDANTS = [
    _descendant(
        "rslora",
        "Kalajdzievski 2023",
        lambda p: jp.lora(RANK, p.kernels, alpha=2 * RANK, scaling="alpha/sqrt(r)"),
        "low rank",
    ),
    _descendant(
        "dora",
        "Liu et al. 2024",
        lambda p: jp.dora(RANK, p.kernels, alpha=2 * RANK),
        "low rank",
    ),
    _descendant(
        "pissa",
        "Meng et al. 2024",
        lambda p: jp.pissa(RANK, p.kernels),
        "low rank",
    ),
    _descendant(
        "olora",
        "Büyükakyüz 2024",
        lambda p: jp.olora(RANK, p.kernels),
        "low rank",
    ),
    _descendant(
        "eva",
        "Paischer et al. 2024",
        lambda p, moments: jp.eva(RANK, p.kernels, moments, alpha=2 * RANK),
        "low rank",
        needs="moments",
    ),
    _descendant(
        "corda",
        "Yang et al. 2024",
        lambda p, moments: jp.corda(RANK, p.kernels, moments),
        "low rank",
        needs="moments",
    ),
    _descendant(
        "lora_ga",
        "Wang et al. 2024",
        lambda p, gradients: jp.lora_ga(
            RANK, p.kernels, gradients, alpha=2 * RANK, scaling="alpha/sqrt(r)"
        ),
        "low rank",
        needs="gradients",
    ),
    _descendant(
        "lora+",
        "Hayou et al. 2024",
        lambda p: jp.lora(RANK, p.kernels, alpha=2 * RANK),
        "low rank",
        wrap=_faster,
    ),
    adalora(RANK),
    _descendant(
        "lora_fa",
        "Zhang et al. 2023",
        lambda p: jp.lora_fa(RANK, p.kernels, alpha=2 * RANK),
        "low rank",
    ),
    _descendant(
        "vera",
        "Kopiczko et al. 2023",
        lambda p: jp.vera(VERA_RANK, p.kernels),
        "vectors",
    ),
    _descendant(
        "loha",
        "Hyeon-Woo et al. 2021",
        lambda p: jp.loha(RANK // 2, p.kernels, alpha=RANK),
        "low rank",
    ),
    _descendant(
        "lokr",
        "Yeh et al. 2023",
        lambda p: jp.lokr(RANK, p.kernels, alpha=2 * RANK),
        "low rank",
    ),
    _descendant(
        "hira",
        "Huang et al. 2025",
        lambda p: jp.hira(RANK, p.kernels),
        "low rank",
    ),
    _descendant(
        "miss",
        "Kang and Yin 2024",
        lambda p: jp.miss(RANK, p.kernels),
        "low rank",
    ),
    _descendant(
        "oft",
        "Qiu et al. 2023",
        lambda p: jp.oft(BLOCK, p.kernels),
        "rotations",
    ),
    _descendant(
        "boft",
        "Liu et al. 2023",
        lambda p: jp.boft(BLOCK, p.kernels, n_butterfly_factors=2),
        "rotations",
        "its feed-forward width, 172, has no butterfly of two factors",
    ),
    _descendant(
        "hra",
        "Yuan et al. 2024",
        lambda p: jp.hra(RANK, p.kernels),
        "rotations",
    ),
    _descendant(
        "road",
        "Liao et al. 2024",
        lambda p: jp.road(p.kernels),
        "vectors",
    ),
    _descendant(
        "sparse",
        "Bhardwaj et al. 2024",
        lambda p: jp.sparse_delta(ENTRIES, p.kernels),
        "entries",
    ),
    _descendant(
        "moelora",
        "Liu et al. 2023",
        lambda p: _of_one_task(
            jp.moelora(RANK, p.kernels, experts=EXPERTS, tasks=1, alpha=2 * RANK)
        ),
        "low rank",
    ),
    _descendant(
        "poly",
        "Ponti et al. 2022",
        lambda p: _of_one_task(
            jp.poly(RANK // EXPERTS, p.kernels, skills=EXPERTS, tasks=1, alpha=2 * RANK)
        ),
        "low rank",
    ),
]


def _rank(rank: int) -> Row:
    """LoRA of another rank, or a matrix's smaller side; alpha / rank, and the rates, stay."""

    def make(p: Places) -> Any:
        sides = {path: (site.size("in"), site.size("out")) for path, site in p.kernels.items()}
        ranks = {path: min(rank, *both) for path, both in sides.items()}
        return jp.lora(ranks, p.kernels, alpha={path: 2 * r for path, r in ranks.items()})

    return _descendant(f"lora r={rank}", "Hu et al. 2021", make, "low rank")


RANKS = [_rank(rank) for rank in (1, 2, 4, 16, 64)]

#: Those that benchmarks/prompts.py compares.
PROMPTS = [
    PROBE,
    *(_input(length, "vocabulary") for length in (1, 5, 100)),
    *(_input(VIRTUAL, start) for start in ("random", "random words", "text")),
    *(row for row in ROWS if row.name in ("prompt", "prefix", "p-tuning v2")),
]
