"""LongLoRA against full attention at longer contexts: python benchmarks/longlora.py --json

The base of examples/demo, pretrained on texts of T0 = 256 tokens, is tuned on texts of T = 1, 2, 4
and 8 times as many with interpolated positions, in steps of the same number of tokens. The texts
are the demo's: Python modules, joined to one stream and cut into windows; held out are whole
modules. By the attention of training and by what is trained:

    full, lora           LoRA on the projections of attention (rank 16, alpha 32, as in the demo)
    full, longlora       that, the embedding (tied: the head too) and the norms
    blocked, longlora    the same numbers by the demo's attention (examples/demo/attention.py),
                         which leaves out most pairs that are not seen and forms the others' scores
                         again in the backward pass; costs alone
    shifted, longlora    shifted sparse attention over groups of T / 4

    peak_bytes         of the compiled training step: arguments + outputs + temporaries - aliased;
                       all layers unrolled, no layer computed again
    remat_peak_bytes   with layers in one scan, each computed again in the backward pass
    flops              as XLA counts them in the unrolled step
    seconds            of CPU, median of the unrolled steps, taken in turn. On one core that is
                       what a clock shows when nothing else runs
    ..._vs_full        each over that of "full, longlora" at the same T (time: median of the
                       ratios of neighbours; perplexity: mean over seeds)
    perplexity         exp of the mean loss on held-out windows of T tokens, with full attention
                       and the same interpolation, mean and range over seeds. At all T it is that
                       of the same tokens
    perplexity_short   of the same tuned models on the same tokens cut into windows of T0: what
                       perplexity lies below it is owed to the longer context

Every run is 60 steps of 2048 tokens, Adam, the rate warmed up in 6 steps and then falling linearly
to zero; float32. "full" is trained by the blocked program, which computes the same in less time.
Each of lora and longlora has the best of the rates of SWEPT at the longest T with full attention,
seed 0, on modules of the training text that no run is trained on.

    --sweep     what SWEPT holds: perplexity at these rates; 8 minutes of a core
    --short     the shortest and the longest, a few steps, writes nothing: 3 minutes of a core

23 minutes of CPU on one core. The last line is JSON; a full run writes results/longlora.json and
results/longlora.md after every length.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax starts
    # The default scheduler trades memory for overlap: it would be measured instead.
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measured import stamp

import jaxpeft as jp
from jaxpeft.data import TextTokenizer
from jaxpeft.models import decoder, shifted_sparse
from jaxpeft.train import cross_entropy, init, train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "examples" / "demo"
sys.path.insert(0, str(DEMO))
from attention import blocked  # noqa: E402

# Those on which the demo's rates were swept.
VALIDATION = ("fileinput", "linecache", "poplib", "queue", "reprlib", "selectors", "zipapp")
RANK, ALPHA = 16, 32
# Perplexity on them by rate, at the longest texts. At T = 2 T0, 1e-2 is the best of each too.
SWEPT = {
    "lora": {1e-3: 62.27, 3e-3: 46.38, 6e-3: 41.54, 1e-2: 38.99, 3e-2: 51.11},
    "longlora": {5e-4: 55.27, 1e-3: 44.01, 3e-3: 32.41, 6e-3: 29.98, 1e-2: 29.95, 2e-2: 37.76},
}
COSTS = ("peak_bytes", "remat_peak_bytes", "flops", "seconds")


class Arm(NamedTuple):
    attention: str  # of training
    longlora: bool  # the embedding and the norms are trained, too
    tuned: bool = True


ARMS = {
    "full, lora": Arm("full", False),
    "full, longlora": Arm("full", True),
    "blocked, longlora": Arm("blocked", True, tuned=False),
    "shifted, longlora": Arm("shifted", True),
}
REFERENCE = "full, longlora"


@dataclasses.dataclass(frozen=True)
class Plan:
    multiples: tuple[int, ...] = (8, 4, 2, 1)
    tokens: int = 2048  # of a step, whatever the length of a text
    steps: int = 60
    seeds: tuple[int, ...] = (0, 1)
    rounds: int = 5  # timed steps of each arm


WHOLE = Plan()
SHORT = Plan(multiples=(8, 1), steps=3, seeds=(0,), rounds=1)


# Texts -------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Streams of tokens, cut into windows where they are used."""

    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def demo_texts() -> Texts:
    """The demo's modules, each behind an end of text."""
    tokenizer = TextTokenizer(DEMO / "base").tokenizer

    def stream(file, chosen):
        modules = {}
        for line in (DEMO / "data" / file).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            modules.setdefault(record["module"], []).append(record["text"])
        texts = ["\n".join(pieces) for module, pieces in modules.items() if chosen(module)]
        return np.concatenate([[0, *tokenizer.encode(text).ids] for text in texts]).astype(np.int32)

    return Texts(
        stream("train.jsonl", lambda module: module not in VALIDATION),
        stream("train.jsonl", lambda module: module in VALIDATION),
        stream("heldout.jsonl", lambda module: True),
    )


def windows(stream: np.ndarray, length: int, longest: int | None = None) -> np.ndarray:
    """(count, length + 1); a window begins with the last token of the one before.

    What does not fill a window of `longest` tokens is left out, so that all lengths that divide it
    have the same targets.
    """
    longest = longest or length
    count = (len(stream) - 1) // longest * longest // length
    return stream[np.arange(count)[:, None] * length + np.arange(length + 1)]


def batches(
    stream: np.ndarray, length: int, tokens: int, steps: int, seed: int
) -> Iterator[np.ndarray]:
    """(tokens / length, length + 1) for each step; every epoch cuts the stream elsewhere."""
    rng, rows, left = np.random.default_rng(seed), tokens // length, []
    for _ in range(steps):
        while len(left) < rows:
            epoch = windows(stream[rng.integers(length) :], length)
            left = [*left, *epoch[rng.permutation(len(epoch))]]
        yield np.stack(left[:rows])
        left = left[rows:]


# Models ------------------------------------------------------------------------------------------


def optimizer(rate: Any, steps: int) -> optax.GradientTransformation:
    warm = steps // 10
    fall = optax.linear_schedule(1.0, 0.0, steps - warm, warm)
    return optax.adam(lambda step: rate * jnp.minimum((step + 1) / (warm + 1), fall(step)))


class Base(NamedTuple):
    config: decoder.Config  # `context` is T0
    params: Any

    def at(self, multiple: int) -> decoder.Config:
        """The configuration for `multiple` times the context, positions interpolated."""
        if multiple == 1:
            return self.config
        rope = dataclasses.replace(self.config.rope, rope_type="linear", factor=float(multiple))
        return dataclasses.replace(
            self.config,
            rope=rope,
            max_position_embeddings=multiple * self.config.max_position_embeddings,
        )


class Cell:
    """One arm at one multiple: its step, compiled once, and runs of it."""

    def __init__(self, base: Base, multiple: int, arm: Arm, plan: Plan):
        self.base, self.arm, self.plan = base, arm, plan
        self.config = base.at(multiple)
        self.length = self.config.max_position_embeddings
        sites = jp.sites(decoder.apply_fn(self.config), base.params, np.zeros((1, 8), np.int32))
        attention = sites.match("layers/attn/*/kernel")
        if arm.longlora:
            self.method = jp.longlora(RANK, attention, sites.embedding, sites.norm, alpha=ALPHA)
        else:
            self.method = jp.lora(RANK, attention, alpha=ALPHA)

    def program(self, attention: str, **options):
        """The training step (state, frozen, batch, rate), compiled."""
        kinds = {
            "full": decoder.attention,
            "blocked": blocked,
            "shifted": shifted_sparse(self.length // 4),
        }
        forward = decoder.apply_fn(self.config, attention_fn=kinds[attention], **options)
        forward = jp.lift(forward, materialize="error")

        def loss(frozen, adapter, batch, key):
            del key  # nothing is random
            return cross_entropy(forward(jp.combine(frozen, adapter), batch[:, :-1]), batch[:, 1:])

        def step(state, frozen, batch, rate):
            tx = optimizer(rate, self.plan.steps)
            return train_step(loss, tx, max_grad_norm=1.0)(state, frozen, batch, None)

        state, frozen = jax.eval_shape(functools.partial(self.start, 0))
        shape = self.plan.tokens // self.length, self.length + 1
        batch, rate = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
        return jax.jit(step, donate_argnums=0).lower(state, frozen, batch, rate).compile()

    @functools.cached_property
    def step(self):
        """The step that is measured."""
        return self.program(self.arm.attention, unroll=self.config.num_layers)

    @functools.cached_property
    def tuner(self):
        """The step that runs take."""
        if self.arm.attention == "full":
            return self.program("blocked", unroll=self.config.num_layers)
        return self.step

    def start(self, seed):
        frozen, adapter = jp.split(self.method(jax.random.key(seed), self.base.params))
        return init(adapter, optimizer(0.0, self.plan.steps)), frozen

    def run(self, stream: np.ndarray, rate: float, seed: int) -> Any:
        """The tuned tree of parameters."""
        state, frozen = self.start(seed)
        data = batches(stream, self.length, self.plan.tokens, self.plan.steps, seed)
        for batch in data:
            state, _ = self.tuner(state, frozen, batch, jnp.float32(rate))
        return jp.combine(frozen, state.adapter)

    def costs(self) -> dict[str, float]:
        """What one step takes, time apart."""
        state, _ = jax.eval_shape(functools.partial(self.start, 0))
        return {
            "trained": sum(x.size for x in jax.tree.leaves(state.adapter)),
            "peak_bytes": peak(self.step),
            "remat_peak_bytes": peak(self.program(self.arm.attention, remat="full")),
            "flops": self.step.cost_analysis()["flops"],
        }


def peak(program) -> int:
    """Bytes of everything that a call needs."""
    memory = program.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(taken + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


class Reader:
    """Perplexity with full attention, computed in blocks."""

    def __init__(self, config: decoder.Config, tokens: int):
        self.tokens = tokens
        forward = jp.lift(decoder.apply_fn(config, unroll=config.num_layers, attention_fn=blocked))

        def total(params, batch):
            return cross_entropy(forward(params, batch[:, :-1]), batch[:, 1:])[0]

        self.total = jax.jit(total)

    def __call__(self, params: Any, data: np.ndarray) -> float:
        """exp of the mean loss over windows (count, T + 1)."""
        rows = self.tokens // (data.shape[1] - 1)
        sums = [self.total(params, data[i : i + rows]) for i in range(0, len(data), rows)]
        return math.exp(sum(map(float, sums)) / data[:, 1:].size)


# Measurements ------------------------------------------------------------------------------------


def say(*words):
    print(*words, flush=True)


def timed(cells: dict[str, Cell], stream: np.ndarray) -> dict[str, list[float]]:
    """CPU seconds of each arm's steps, the arms in turn; the first round warms up."""
    begun = {name: cell.start(0) for name, cell in cells.items()}
    rounds = next(iter(cells.values())).plan.rounds
    found = {name: [] for name in cells}
    for _ in range(rounds + 1):
        for name, cell in cells.items():
            state, frozen = begun[name]
            batch = next(batches(stream, cell.length, cell.plan.tokens, 1, 0))
            begin = time.process_time()
            state, _ = jax.block_until_ready(cell.step(state, frozen, batch, jnp.float32(0)))
            found[name].append(time.process_time() - begin)
            begun[name] = state, frozen  # the old one was donated
    return {name: seconds[1:] for name, seconds in found.items()}


def costs(cells: dict[str, Cell], stream: np.ndarray) -> dict[str, dict[str, float]]:
    """By arm: bytes, FLOPs and seconds of a step, and each over the reference's."""
    seconds = timed(cells, stream)
    rows = {
        name: cell.costs() | {"seconds": statistics.median(seconds[name])}
        for name, cell in cells.items()
    }
    for name, row in rows.items():
        pairs = zip(seconds[name], seconds[REFERENCE], strict=True)
        for cost in COSTS:
            row[f"{cost}_vs_full"] = row[cost] / rows[REFERENCE][cost]
        row["seconds_vs_full"] = statistics.median(mine / full for mine, full in pairs)
    return rows


def cells_at(base: Base, plan: Plan, multiple: int) -> dict[str, Cell]:
    cells = {name: Cell(base, multiple, arm, plan) for name, arm in ARMS.items()}
    # The same program, compiled once.
    cells["full, longlora"].tuner = cells["blocked, longlora"].step
    return cells


def best(kind: str) -> float:
    return min(SWEPT[kind], key=SWEPT[kind].__getitem__)


def sweep(base: Base, texts: Texts, plan: Plan) -> dict[str, dict[float, float]]:
    """Perplexity on the validation part at the rates of `SWEPT`."""
    longest = max(plan.multiples)
    cells, found = cells_at(base, plan, longest), {}
    for kind, rates in SWEPT.items():
        cell = cells[f"full, {kind}"]
        read, data = Reader(cell.config, plan.tokens), windows(texts.validation, cell.length)
        found[kind] = {rate: read(cell.run(texts.train, rate, 0), data) for rate in rates}
        say(f"{kind}: {found[kind]}")
    return found


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "range": max(values) - min(values), "runs": values}


def at(multiple: int, base: Base, texts: Texts, plan: Plan) -> dict[str, Any]:
    """All figures of one length."""
    cells = cells_at(base, plan, multiple)
    config, short = cells[REFERENCE].config, base.config.max_position_embeddings
    longest = max(plan.multiples) * short
    long_, cut = (
        windows(texts.held_out, t, longest) for t in (config.max_position_embeddings, short)
    )
    read, plain = Reader(config, plan.tokens), Reader(base.config, plan.tokens)
    found = {
        "length": config.max_position_embeddings,
        "rows": plan.tokens // config.max_position_embeddings,
        "base": {
            "not interpolated": plain(base.params, long_),
            "interpolated": read(base.params, long_),
        },
        "arms": costs(cells, texts.train),
    }
    say(f"T = {config.max_position_embeddings}: base {found['base']}")
    for name, row in found["arms"].items():
        said = [f"{cost} {row[f'{cost}_vs_full']:.3f}" for cost in COSTS]
        say(f"T = {config.max_position_embeddings}: {name}, of full's {', '.join(said)}")
    for name, cell in cells.items():
        if not cell.arm.tuned:
            continue
        row, rate = found["arms"][name], best("longlora" if cell.arm.longlora else "lora")
        tuned = [cell.run(texts.train, rate, seed) for seed in plan.seeds]
        row["perplexity"] = spread([read(tree, long_) for tree in tuned])
        row["perplexity_short"] = spread([read(tree, cut) for tree in tuned])
        say(
            f"T = {config.max_position_embeddings}: {name}, "
            f"perplexity {row['perplexity']['runs']}, "
            f"in windows of {short} {row['perplexity_short']['runs']}"
        )
    full = found["arms"][REFERENCE]["perplexity"]["runs"]
    for row in found["arms"].values():
        if "perplexity" in row:
            pairs = zip(row["perplexity"]["runs"], full, strict=True)
            row["perplexity_vs_full"] = spread([mine / other for mine, other in pairs])
    return found


def measure(base: Base, texts: Texts, plan: Plan) -> Iterator[dict[str, Any]]:
    """The figures of the lengths so far, after each."""
    begin, lengths = time.perf_counter(), []
    for multiple in plan.multiples:
        lengths.append(at(multiple, base, texts, plan))
        yield {
            "jax": jax.__version__,
            "context": base.config.max_position_embeddings,
            "plan": dataclasses.asdict(plan),
            "tokens": {name: len(stream) for name, stream in texts._asdict().items()},
            "rates": {kind: best(kind) for kind in SWEPT},
            "lengths": sorted(lengths, key=lambda one: one["length"]),
            "minutes": round((time.perf_counter() - begin) / 60, 1),
        }


def table(result: dict[str, Any]) -> str:
    plan, short, rates = result["plan"], result["context"], result["rates"]
    longest = max(plan["multiples"]) * short
    read = (result["tokens"]["held_out"] - 1) // longest * longest
    lines = [
        "# LongLoRA against full attention",
        "",
        f"`benchmarks/longlora.py`: jax {result['jax']}, one CPU, float32. The demo's base, of "
        f"context T0 = {short}, tuned on windows of T tokens with interpolated positions: "
        f"{plan['steps']} steps of {plan['tokens']} tokens, Adam, rate {rates['lora']:g} for "
        f"`lora` and {rates['longlora']:g} for `longlora`, {len(plan['seeds'])} seeds. Shifted "
        "sparse attention over groups of T / 4 in training; perplexity is measured with full "
        f"attention, on the same {read} held-out tokens at every T. Time is of CPU. Ratios (x) are "
        f'to "{REFERENCE}" of the same T.',
        "",
        "| T | training | trained | MB | x | MB, remat | x | GFLOP | x | s a step | x |",
        "|---:|---|---:|" + "---:|" * 8,
    ]
    for one in result["lengths"]:
        for name, row in one["arms"].items():
            cells = [one["length"], name, f"{row['trained']:,}"]
            units = {"peak_bytes": (1e-6, 0), "remat_peak_bytes": (1e-6, 0), "flops": (1e-9, 1)}
            for cost in COSTS:
                unit, digits = units.get(cost, (1, 2))
                cells += [f"{row[cost] * unit:.{digits}f}", f"{row[f'{cost}_vs_full']:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    tuned = [name for name, arm in ARMS.items() if arm.tuned]
    lines += [
        "",
        f"Perplexity: mean over seeds ± half the range, and in brackets that of the same models "
        f"on the same tokens in windows of {short}.",
        "",
        f"| T | base | interpolated | {' | '.join(tuned)} |",
        "|---:|" + "---:|" * (2 + len(tuned)),
    ]
    for one in result["lengths"]:
        cells = [str(one["length"]), *(f"{one['base'][kind]:.1f}" for kind in one["base"])]
        for name in tuned:
            row = one["arms"][name]
            seen, cut = row["perplexity"], row["perplexity_short"]
            cells.append(f"{seen['mean']:.2f} ± {seen['range'] / 2:.2f} ({cut['mean']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line is JSON (it always is)")
    parser.add_argument("--sweep", action="store_true", help="perplexity by rate, and no more")
    parser.add_argument("--short", action="store_true", help="a few steps; writes nothing")
    options = parser.parse_args()
    base, texts = Base(*decoder.load(DEMO / "base", jnp.float32)), demo_texts()
    if options.sweep:
        print(json.dumps(sweep(base, texts, WHOLE)))
        return
    for result in measure(base, texts, SHORT if options.short else WHOLE):
        if not options.short:
            (RESULTS / "longlora.json").write_text(json.dumps(result, indent=1) + "\n")
            (RESULTS / "longlora.md").write_text(table(result))
            stamp("longlora")
    say(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
