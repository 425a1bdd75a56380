"""One method on one task: compiled once, then run at any rate from any seed."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from comparison.places import places
from comparison.rows import Row
from comparison.tasks import MAX_NEW, Split, Task
from jaxpeft import train
from jaxpeft.models import decoder, heads
from jaxpeft.serve import generator

#: Of every row's head, the probe's too. On validation the probe's span F1 (SNIPS) is 52, 59 and 61
#: at 3e-3, 1e-2 and 3e-2, and its BLEU (E2E) 3.7 and 6.5 at the first two.
HEAD_RATE = 1e-2
WARMUP = 0.1  # part of the steps
CLIP = 1.0
ASKED = 64  # rows of a batch that is not trained on


class Trained(NamedTuple):
    """A tree in its two parts, after training."""

    frozen: Any
    adapter: Mapping[str, Any]


def optimizer(rate: Any, steps: int, labels: Mapping[str, str]) -> optax.GradientTransformation:
    """Adam, warmed up and then falling linearly to zero; the head at its own rate."""
    warm = max(round(WARMUP * steps), 1)

    def adam(peak: Any) -> optax.GradientTransformation:
        def at(step: Any) -> Any:
            return peak * jnp.minimum((step + 1) / warm, (steps - step) / max(steps - warm, 1))

        return optax.adam(at)

    return optax.partition({"head": adam(HEAD_RATE), "adapter": adam(rate)}, dict(labels))


def trimmed(call: Callable[[Split], Any], batch: Split, lengths: Sequence[int]) -> Any:
    """`call(batch)` at the shortest of the lengths that holds all tokens, in one program.

    Padding is on the right. What `call` returns must have one shape whatever the length.
    """
    if len(lengths) == 1:
        return call(batch)
    longest = jnp.max(jnp.sum(batch.mask, axis=1))
    which = jnp.sum(longest > jnp.asarray(lengths[:-1]))
    branches = [lambda batch, n=n: call(batch.upto(n)) for n in lengths]
    return jax.lax.switch(which, branches, batch)


class Cell:
    """A method on a task."""

    def __init__(self, task: Task, row: Row, steps: int):
        self.task, self.row, self.steps = task, row, steps
        self.model = task.head.on(task.base.trunk, virtual=row.length)
        self.sites = self._sites()
        self.method = self._method()

    def _sites(self) -> jp.Sites:
        tokens, mask = np.zeros((2, 8), np.int32), np.ones((2, 8), bool)
        params = jax.eval_shape(lambda: self.task.params(0))
        return jp.sites(self.task.head.on(self.task.base.trunk), params, tokens, mask=mask)

    def _method(self) -> Any:
        head = self.sites.every.match(*self.task.head_paths)
        if self.row.make is None:
            return jp.unfreeze(head)
        return jp.chain(self.row.make(places(self.sites, self.task.base)), jp.unfreeze(head))

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """Who trains each array of the adapter: "head" or "adapter"."""
        head = self.sites.every.match(*self.task.head_paths)
        return {path: "head" if path in head else "adapter" for path in self.untrained(0).adapter}

    def untrained(self, seed: int) -> Trained:
        """The tree before the first step. Every method has the same head for a seed."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return Trained(*jp.split(self.method(key, self.task.params(seed))))

    # The model with the method in it --------------------------------------------------------------

    def placed(self, tokens: Any, mask: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Tokens behind the virtual positions, what the model is told of them, and `combine`."""
        length, rows = self.row.length, tokens.shape[0]
        if not length:
            return tokens, {"mask": mask}, {}
        mask = jnp.concatenate([jnp.ones((rows, length), bool), mask], axis=1)
        if self.row.virtual == "ids":
            (table,) = places(self.sites, self.task.base).table.values()
            ids = jnp.asarray(jp.prompts.virtual_token_ids(table, length), tokens.dtype)
            ids = jnp.broadcast_to(ids, (rows, length))
            return jnp.concatenate([ids, tokens], axis=1), {"mask": mask}, {}
        where = {"mask": mask}
        if self.task.base.name == "minilm":
            # Prefixes are keys and values without a position: tokens stay where they were.
            there = jnp.concatenate([jnp.zeros(length, int), jnp.arange(tokens.shape[1])])
            where["positions"] = there[None].astype(jnp.int32)
        tokens, virtual_positions = jp.prompts.prepend_virtual_tokens(tokens, length)
        return tokens, where, {"virtual_positions": virtual_positions}

    def forward(self, frozen: Any, adapter: Any, tokens: Any, mask: Any, model: Any = None) -> Any:
        """Outputs at the tokens' own places, of the task's model or of another on the trunk."""
        tokens, where, call = self.placed(tokens, mask)
        return jp.lift(model or self.model)(jp.combine(frozen, adapter, **call), tokens, **where)

    def loss(self, frozen: Any, adapter: Any, batch: Split, key: Any) -> tuple[Any, Any]:
        """Sum of the losses and how many they are."""
        del key  # nothing is dropped out
        return self.task.head.loss(
            self.forward(frozen, adapter, batch.tokens, batch.mask), batch.labels
        )

    # Training -------------------------------------------------------------------------------------

    def start(self, seed: int) -> tuple[train.State, Any]:
        """The state before the first step, and the frozen tree."""
        frozen, adapter = self.untrained(seed)
        return train.init(adapter, self.tx(0.0)), frozen

    def batches(self, seed: int) -> Any:
        """The batches of a seed, the same for every method."""
        rng, split, rows = np.random.default_rng(seed), self.task.train, self.task.rows
        rounds = -(-self.steps * rows // len(split))
        order = np.concatenate([rng.permutation(len(split)) for _ in range(rounds)])
        for step in range(self.steps):
            yield split.rows(order[step * rows : (step + 1) * rows])

    def tx(self, rate: Any) -> optax.GradientTransformation:
        """What trains the adapter."""
        return optimizer(rate, self.steps, self.labels)

    @functools.cached_property
    def lowered(self) -> Any:
        """The step (state, frozen, batch, rate) -> (state, metrics), before it is compiled."""

        def step(state: Any, frozen: Any, batch: Split, rate: Any) -> Any:
            once = train.train_step(self.loss, self.tx(rate), max_grad_norm=CLIP)
            return trimmed(lambda x: once(state, frozen, x, None), batch, self.task.lengths)

        batch = self.task.train.rows(np.zeros(self.task.rows, int))
        shapes = jax.eval_shape(lambda: (*self.start(0), batch, jnp.float32(0)))
        return jax.jit(step, donate_argnums=0).lower(*shapes)

    @functools.cached_property
    def step(self) -> Any:
        """The compiled step."""
        return self.lowered.compile()

    def train(self, rate: float, seed: int) -> Trained:
        """The method after all steps, or as it was before the first loss that is no number."""
        state, frozen = self.start(seed)
        for batch in self.batches(seed):
            state, _ = self.step(state, frozen, batch, jnp.float32(rate))
        return Trained(frozen, state.adapter)

    @functools.cached_property
    def compiled(self) -> Any:
        """`forward`, compiled."""
        return jax.jit(self.forward)

    # Asking ---------------------------------------------------------------------------------------

    @functools.cached_property
    def predictor(self) -> Any:
        """(frozen, adapter, split) -> likeliest classes, sum of losses, their number."""

        def predict(frozen: Any, adapter: Any, split: Split) -> Any:
            def asked(part: Split) -> Any:
                outputs = self.forward(frozen, adapter, part.tokens, part.mask)
                classes = jnp.argmax(outputs, axis=-1)
                if classes.ndim == 2:
                    missing = split.tokens.shape[1] - classes.shape[1]
                    classes = jnp.pad(classes, ((0, 0), (0, missing)))
                return classes, *self.task.head.loss(outputs, part.labels)

            return trimmed(asked, split, self.task.lengths)

        return jax.jit(predict)

    @functools.cached_property
    def embedder(self) -> Any:
        """(frozen, adapter, split) -> means of the trunk's hidden states."""

        def mean(params: Any, tokens: Any, **where: Any) -> Any:
            hidden = self.task.base.trunk(params["trunk"], tokens, **where)[:, self.row.length :]
            real = where["mask"][:, self.row.length :, None]
            return jnp.sum(jnp.where(real, hidden, 0), axis=1) / jnp.sum(real, axis=1)

        def embed(frozen: Any, adapter: Any, split: Split) -> Any:
            def asked(part: Split) -> Any:
                return self.forward(frozen, adapter, part.tokens, part.mask, mean)

            return trimmed(asked, split, self.task.lengths)

        return jax.jit(embed)

    @functools.cached_property
    def writer(self) -> Any:
        """The compiled generator of (trained, tokens, mask)."""
        following = self.task.head.on(self.task.base.trunk)

        def forward(trained: Trained, tokens: Any, mask: Any = None, *, cache: Any) -> Any:
            if mask is not None:  # the prompts, behind the virtual positions
                tokens, where, call = self.placed(tokens, mask)
                tree = jp.combine(*trained, **call)
                return jp.lift(self.model)(tree, tokens, cache=cache, **where)
            slotted = self.row.length and self.row.virtual == "virtual_positions"
            call = {"virtual_positions": jnp.full(tokens.shape, -1, jnp.int32)} if slotted else {}
            return jp.lift(following)(jp.combine(*trained, **call), tokens, cache=cache)

        def init_cache(rows: int, length: int) -> Any:
            return decoder.init_cache(self.task.base.config, rows, length + self.row.length)

        return generator(
            forward,
            init_cache,
            max_new_tokens=MAX_NEW,
            eos_token_ids=self.task.base.config.eos_token_ids,
        )


class Run:
    """A trained method that is asked."""

    def __init__(self, cell: Cell, trained: Trained):
        self.cell, self.trained = cell, trained
        self._predicted: dict[int, tuple[np.ndarray, float]] = {}

    def predict(self, split: Split) -> tuple[np.ndarray, float]:
        """The likeliest class at each place, and the mean loss."""
        if id(split) not in self._predicted:
            self._predicted[id(split)] = self._predict(split)
        return self._predicted[id(split)]

    def _predict(self, split: Split) -> tuple[np.ndarray, float]:
        parts = list(self._asked(self.cell.predictor, split))
        classes = np.concatenate([np.asarray(classes)[:rows] for rows, (classes, *_) in parts])
        losses, counts = (sum(float(x[i]) for _, x in parts) for i in (1, 2))
        return classes, losses / counts

    def embed(self, split: Split) -> np.ndarray:
        """Mean hidden states (N, D) of the trunk, without the head."""
        parts = self._asked(self.cell.embedder, split)
        return np.concatenate([np.asarray(x)[:rows] for rows, x in parts])

    def write(self, prompts: list[list[int]]) -> list[list[int]]:
        """What greedy generation says behind each prompt, without the end token."""
        longest = max(map(len, prompts))
        tokens = np.zeros((len(prompts), longest), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(prompts):
            tokens[row, longest - len(ids) :], mask[row, longest - len(ids) :] = ids, True
        said = self.cell.writer(self.trained, tokens, mask)
        ends = self.cell.task.base.config.eos_token_ids
        rows = zip(np.asarray(said.tokens).tolist(), np.asarray(said.lengths), strict=True)
        return [[token for token in ids[:length] if token not in ends] for ids, length in rows]

    def _asked(self, call: Any, split: Split) -> Any:
        """(how many rows count, result) of each batch, all of them of one shape."""
        for first in range(0, len(split), ASKED):
            part = split.rows(np.arange(first, min(first + ASKED, len(split))))
            yield len(part), call(*self.trained, _filled(part, ASKED))


def _filled(split: Split, rows: int) -> Split:
    """The examples and empty ones, so that every batch has one shape."""
    if len(split) == rows:
        return split
    empty = rows - len(split)
    labels = [(0, empty)] + [(0, 0)] * (split.labels.ndim - 1)
    return Split(
        np.pad(split.tokens, ((0, empty), (0, 0))),
        # One token is seen, so that means are over something.
        np.concatenate([split.mask, np.arange(split.mask.shape[1]) < np.ones((empty, 1))]),
        np.pad(split.labels, labels, constant_values=heads.IGNORE_INDEX),
    )
