"""What a method costs: time, FLOPs, memory, and what the model forgets.

Times are medians of calls taken in turn with those that they are compared with, in one process,
so that both see the same load.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from comparison import files
from comparison.cell import Cell, Run, Trained
from comparison.rows import PROBE
from comparison.tasks import LENGTHS, Split, Task, base, padded
from jaxpeft.models import decoder
from jaxpeft.serve import generator

SHAPES = {"1x16": (1, 16), "32x128": (32, 128)}  # rows and tokens of a call
STORIES = 64
#: What `measure` gives.
FIELDS = ("trainable", "trainable_with_head", "peak_bytes", "step_time_vs_full")
FIELDS += ("latency_vs_base", "flops_vs_base", "context_used")
SENTENCES = 320  # of Banking77


def measure(cell: Cell, full: Cell, repeats: int) -> dict[str, Any]:
    """The fields of a result that no rate and no seed changes.

    Args:
      cell: The method.
      full: Full fine-tuning on the same task.
      repeats: Calls of each kind; of the small one, ten times as many.
    """
    trained = cell.untrained(0)
    sizes = {path: x.size for path, x in trained.adapter.items()}
    own = [size for path, size in sizes.items() if cell.labels[path] == "adapter"]
    memory = cell.step.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "trainable": sum(own),
        "trainable_with_head": sum(sizes.values()),
        "peak_bytes": int(peak),
        "step_time_vs_full": 1.0 if cell.row == full.row else step_time(cell, full, repeats),
        "latency_vs_base": latency(cell, trained, repeats),
        "flops_vs_base": flops(cell, trained) / flops(plain(cell.task), untuned(cell.task)),
        "context_used": cell.row.length,
    }


# Time --------------------------------------------------------------------------------------------


def in_turn(calls: Sequence[Callable], repeats: int) -> list[float]:
    """Median seconds of each call; the first round, which compiles, is left out."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, found in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            found.append(time.perf_counter() - begin)
    return [statistics.median(found[1:]) for found in seconds]


def step_time(cell: Cell, full: Cell, repeats: int) -> float:
    """Seconds of a training step over those of full fine-tuning."""

    def stepping(cell: Cell) -> Callable:
        state, frozen = cell.start(0)
        batch = next(cell.batches(0))
        held = [state]

        def call() -> Any:
            held[0], metrics = cell.step(held[0], frozen, batch, jnp.float32(0))
            return metrics

        return call

    mine, theirs = in_turn([stepping(cell), stepping(full)], repeats)
    return mine / theirs


def latency(cell: Cell, trained: Trained, repeats: int) -> dict[str, dict[str, float | None]]:
    """Seconds of a call over those of the base with a head, by shape, unmerged and merged.

    Merged is what is best served: dense weights where the method is one of matrices, plain rows
    in the place of a network; `None` where there is neither.
    """
    dense = served(cell, trained)
    kinds = [(plain(cell.task), untuned(cell.task)), (cell, trained)]
    kinds += [(plain(cell.task) if dense.merged else cell, dense.tree)] if dense else []
    found = {}
    for name, (rows, length) in SHAPES.items():
        tokens, mask = np.ones((rows, length), np.int32), np.ones((rows, length), bool)
        calls = [functools.partial(kind.compiled, *parts, tokens, mask) for kind, parts in kinds]
        # Short calls are noisy, and cheap to repeat.
        theirs, mine, *other = in_turn(calls, repeats if rows > 1 else 10 * repeats)
        merged = other[0] / theirs if other else None
        found[name] = {"unmerged": mine / theirs, "merged": merged}
    return found


class Served(NamedTuple):
    """A tree for inference: merged into dense weights, or folded."""

    tree: Trained
    merged: bool


def served(cell: Cell, trained: Trained) -> Served | None:
    """The trained tree as it is best served, if it is not so already."""
    if not (cell.row.length and cell.row.virtual == "virtual_positions"):
        try:
            return Served(Trained(jp.merge(jp.combine(*trained)), {}), True)
        except jp.NotMergeableError:
            pass
    try:
        return Served(Trained(*jp.adapters.drop_reparameterization(*trained)), False)
    except ValueError:
        return None


@functools.cache
def plain(task: Task) -> Cell:
    """The base with its head, in the form of a method."""
    return Cell(task, PROBE, 1)


def untuned(task: Task) -> Trained:
    """The parameters of the base with its head, nothing marked."""
    return Trained(task.params(0), {})


# FLOPs -------------------------------------------------------------------------------------------


def flops(cell: Cell, trained: Trained) -> float:
    """Of a call of the larger shape. Layers are unrolled: XLA counts one round of a loop."""
    model = cell.task.head.on(cell.task.base.unrolled, virtual=cell.row.length)

    def call(frozen: Any, adapter: Any, tokens: Any, mask: Any) -> Any:
        return cell.forward(frozen, adapter, tokens, mask, model)

    tokens = jax.ShapeDtypeStruct(SHAPES["32x128"], jnp.int32)
    mask = jax.ShapeDtypeStruct(SHAPES["32x128"], bool)
    return jax.jit(call).lower(*trained, tokens, mask).cost_analysis()["flops"]


# Forgetting --------------------------------------------------------------------------------------


def forgetting(run: Run) -> float:
    """stories260k: loss on the base's stories. MiniLM: mean cosine to the base's embeddings."""
    if run.cell.task.base.name == "stories260k":
        return run.predict(stories())[1]
    return _cosine(run.embed(sentences()), _embeddings(run.cell.task))


def unforgotten(task: Task) -> float:
    """The same of the base itself."""
    return forgetting(Run(plain(task), untuned(task)))


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(np.mean(np.sum(x * y, axis=-1) / lengths))


@functools.cache
def _embeddings(task: Task) -> np.ndarray:
    return Run(plain(task), untuned(task)).embed(sentences())


@functools.cache
def sentences() -> Split:
    """Sentences of Banking77's test part, spread over its classes."""
    texts = [row["text"] for row in files.rows("banking77/test.csv")]
    at = np.linspace(0, len(texts) - 1, min(SENTENCES, len(texts))).astype(int)
    tokenizer = base("minilm").tokenizer
    ids = [tokenizer.encode(texts[i]).ids for i in at]
    tokens, mask = padded(ids, LENGTHS["minilm"][-1])
    return Split(tokens, mask, np.zeros(len(tokens), np.int32))


@functools.cache
def stories() -> Split:
    """Stories drawn from the base at temperature 1."""
    model = base("stories260k")
    bos = model.tokenizer.encode("").ids[0]
    write = generator(
        decoder.apply_fn(model.config),
        functools.partial(decoder.init_cache, model.config),
        max_new_tokens=LENGTHS["stories260k"][-1] - 1,
        temperature=1.0,
        eos_token_ids=model.config.eos_token_ids,
    )
    start = jnp.full((STORIES, 1), bos, jnp.int32)
    said = write(model.params, start, key=jax.random.key(0))
    lengths = np.asarray(said.lengths).tolist()
    rows = zip(np.asarray(said.tokens).tolist(), lengths, strict=True)
    tokens, mask = padded([[bos, *ids[:n]] for ids, n in rows], LENGTHS["stories260k"][-1])
    return Split(tokens, mask, np.where(mask, tokens, -100).astype(np.int32))
