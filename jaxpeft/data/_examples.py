"""Training data: from records in a file to batches of numpy arrays, through grain.

Everything is read, checked and tokenized before the first step, so a fault in the last line
is known at once, and so is the number of steps. A batch is a function of its number and the
seed alone: the position in the data is one integer, and a run that is resumed there goes on
exactly.
"""

import bisect
import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft._errors import UserError, need
from jaxpeft.data._chat import TemplateError
from jaxpeft.data._records import Record, read_records
from jaxpeft.data._tokenizer import TextTokenizer, Tokens

_log = logging.getLogger("jaxpeft")

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Completion:
    """Records of a prompt and what should follow it. The loss counts what follows.

    Both are tokenized as one text. A token that reaches from the prompt into the completion
    belongs to the completion.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    separator: str = ""  # written between the two, part of the prompt

    def tokens(self, record: Record, tokenizer: TextTokenizer) -> Tokens:
        prompt = record.text(self.prompt) + self.separator
        text = prompt + record.text(self.completion)
        return tokenizer.encode(text, [(len(prompt), len(text))])


@dataclass(frozen=True)
class Chat:
    """Records of messages, each with `role` and `content`. The loss counts assistant turns."""

    messages: str = "messages"
    tools: str = "tools"  # what the template is given as tools, where a record has it

    def tokens(self, record: Record, tokenizer: TextTokenizer) -> Tokens:
        messages = record.value(self.messages)
        self._check(record, messages)
        try:
            tokens = tokenizer.encode_chat(messages, record.fields.get(self.tools))
        except TemplateError as error:
            raise record.error(str(error)) from error
        if not tokens.counted.any():
            raise record.error(f"field {self.messages!r} has no assistant turn to learn from.")
        return tokens

    def _check(self, record, messages):
        if not isinstance(messages, list):
            kind = type(messages).__name__
            raise record.error(f"field {self.messages!r} is {kind}, not a list of messages.")
        if not messages:
            raise record.error(f"field {self.messages!r} is empty.")
        for i, message in enumerate(messages):
            place = f"{self.messages}[{i}]"
            if not isinstance(message, dict):
                kind = type(message).__name__
                raise record.error(f"{place!r} is {kind}, not an object with role and content.")
            nested = record._replace(
                fields={f"{place}.{name}": value for name, value in message.items()}
            )
            nested.text(f"{place}.role")
            if not message.get("tool_calls"):
                content = nested.value(f"{place}.content")
                if not content or not isinstance(
                    content, list
                ):  # a list of parts is the template's
                    nested.text(f"{place}.content")


@dataclass(frozen=True)
class Text:
    """Records of plain text. The loss counts all of it."""

    text: str = "text"

    def tokens(self, record: Record, tokenizer: TextTokenizer) -> Tokens:
        return tokenizer.encode(record.text(self.text))


Fields = Completion | Chat | Text


def _fields_of(record):
    for fields in (Chat(), Completion(), Text()):
        first = next(iter(vars(fields).values()))
        if first in record.fields:
            return fields
    there = ", ".join(repr(name) for name in record.fields)
    raise record.error(
        f"none of the fields 'messages', 'prompt', 'text'. The fields there are: {there}. Say "
        f"which to use, with Completion(prompt=..., completion=...), Chat(...) or Text(...)."
    )


class Examples:
    """Tokenized records, none longer than the context.

    Args:
      examples: In the order of the file.
      context: Tokens that a model reads at once. An example has up to one more, since the
        last token is a target only.
      long: What happens to longer ones: "truncate" keeps the begin, "drop" leaves them out,
        "split" cuts them into pieces, in which every token is a target once.
      source: A name for messages.
    """

    def __init__(
        self, examples: list[Tokens], *, context: int, long: str = "truncate", source: Any = "data"
    ):
        if context < 1:
            raise ValueError(f"`context` is a number of tokens, at least 1; got {context}.")
        if long not in ("truncate", "drop", "split"):
            raise ValueError(f'`long` is "truncate", "drop" or "split", got {long!r}.')
        self.context = context
        self.long = long
        self.source = source
        self.read = len(examples)
        self.too_long = 0  # longer than the context
        self.dropped = 0  # left out: too long, or nothing left for the loss
        kept: list[Tokens] = []
        for example in examples:
            pieces = self._cut(example)
            counted = [piece for piece in pieces if piece.counted[1:].any()]
            self.dropped += not counted
            kept += counted
        if not kept:
            raise UserError(
                f"{source}: nothing is left to train on. {self.summary()} Allow a longer context, "
                f'or long="split".'
            )
        # One array for all: a list of small ones takes several times the memory.
        self._ids = np.concatenate([example.ids for example in kept])
        self._counted = np.concatenate([example.counted for example in kept])
        self._ends = np.cumsum([0, *(len(example.ids) for example in kept)])
        if self.too_long or self.dropped:
            _log.warning("%s: %s", source, self.summary())

    def _cut(self, example):
        size = self.context + 1
        if len(example.ids) <= size:
            return [example]
        self.too_long += 1
        if self.long == "drop":
            return []
        stop = len(example.ids) - 1 if self.long == "split" else 1
        cuts = [slice(start, start + size) for start in range(0, stop, self.context)]
        return [Tokens(example.ids[cut], example.counted[cut]) for cut in cuts]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Tokens:
        place = slice(self._ends[index], self._ends[index + 1])
        return Tokens(self._ids[place], self._counted[place])

    @property
    def lengths(self) -> np.ndarray:
        """Places that each example takes in a row: its tokens but the last, at least 1."""
        return np.diff(self._ends) - 1

    @property
    def targets(self) -> int:
        """Tokens that the loss counts, in one pass over the examples."""
        firsts = self._counted[self._ends[:-1]]
        return int(self._counted.sum() - firsts.sum())

    def summary(self) -> str:
        """What became of the records, in one line."""
        done = {"truncate": "cut off there", "drop": "left out", "split": "cut into pieces"}
        return (
            f"{self.too_long} of {self.read} records are longer than the context of "
            f"{self.context} tokens and were {done[self.long]}; {self.dropped} in all were left "
            f"out, too long or without a token for the loss."
        )


def read_examples(
    file: str | Path,
    tokenizer: TextTokenizer,
    *,
    context: int,
    fields: Fields | None = None,
    long: str = "truncate",
) -> Examples:
    """Reads and tokenizes a .jsonl or .csv file.

    Args:
      file: Where the records are.
      tokenizer: Of the model's folder.
      context: Tokens that the model reads at once.
      fields: `Completion`, `Chat` or `Text`, with the names of the fields in this file.
        `None` decides by the first record's: messages, else prompt, else text.
      long: "truncate", "drop" or "split", see `Examples`. What happened is counted, and
        logged where it happened at all.
    Raises:
      UserError: for whatever is wrong with the file, naming file, line and field.
    """
    examples = []
    for record in read_records(file):
        fields = fields or _fields_of(record)
        examples.append(fields.tokens(record, tokenizer))
    if not examples:
        raise UserError(f"{file} holds no records.")
    return Examples(examples, context=context, long=long, source=file)


class Batches:
    """Batches of examples, by number: a source for grain, and iterable through it.

    Each batch is a dict of arrays (rows, context): `tokens` int32, `targets` int32 (at each
    place the token that follows), `weights` float32 (1 where the loss counts the target),
    `segment_ids` int32 (1, 2, ... for the examples of a row, 0 for padding), `positions`
    int32 (from 0 in each example). With `virtual`, rows are longer by as many places, each
    example stands behind virtual tokens of its own, in its segment and its positions, and there are
    `virtual_positions` int32 (0, 1, ... at virtual tokens, -1 at real ones), for
    `combine(..., virtual_positions=...)`.

        batches = Batches(examples, batch_size=8, epochs=3)
        len(batches)               # steps of three epochs
        iter(batches)              # a grain iterator, with get_state and set_state
        batches.dataset().map(f)   # a grain.MapDataset, to be carried further

    Args:
      examples: What to train on.
      batch_size: Rows of a batch, over all processes together.
      pack: Several examples to a row, as they fit; else one, and padding.
      shuffle: Another order in each epoch; else the order of the file, unpacked rows exactly.
      seed: Of the orders.
      epochs: How often each example comes, `None` without end. After the last, the last batch
        is filled up with padding, so that all batches have one shape.
      shard: `(index, count)` of this process where several each make their part of a batch,
        as `jax.make_array_from_process_local_data` takes them.
      virtual: How many placeholders stand in front of each example, for a prefix, or the ids that
        do, for a prompt (`jp.prompts.virtual_token_ids`).
    """

    ENDLESS = 2**40

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        pack: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        shard: tuple[int, int] = (0, 1),
        virtual: int | Sequence[int] | np.ndarray = 0,
    ):
        index, count = shard
        if batch_size < 1:
            raise ValueError(f"`batch_size` is a number of rows, at least 1; got {batch_size}.")
        if epochs is not None and epochs < 1:
            raise ValueError(f"`epochs` is at least 1, or None without end; got {epochs}.")
        if not 0 <= index < count or batch_size % count:
            raise ValueError(
                f"`shard=(index, count)` needs an index below the count and a count that divides "
                f"`batch_size`; got {shard} and {batch_size}."
            )
        self._front = _in_front(virtual)
        self._examples = examples
        self._batch_size = batch_size
        self._pack = pack
        self._shuffle = shuffle
        self._seed = seed
        self._epochs = epochs
        self._shard = shard
        self._starts = [0]  # the first row of each epoch, as far as known
        self._lock = threading.Lock()  # grain reads from a thread of its own
        self._rows_of = functools.lru_cache(maxsize=2)(self._arrange)

    def __len__(self) -> int:
        if self._epochs is None:
            return self.ENDLESS
        with self._lock:
            return -(-self._first_row(self._epochs) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        mine, count = self._shard
        rows = self._batch_size // count
        first = index * self._batch_size + mine * rows
        shape = (rows, self._examples.context + len(self._front))
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "targets": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        if len(self._front):
            batch["virtual_positions"] = np.full(shape, -1, np.int32)
        for row in range(rows):
            self._fill({name: x[row] for name, x in batch.items()}, self._row(first + row))
        return batch

    def __iter__(self) -> Iterator[Batch]:
        grain = _grain()
        # One thread and few batches ahead: a batch is copied together in microseconds.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(self.dataset().to_iter_dataset(options))

    def dataset(self) -> Any:
        """These batches as a `grain.MapDataset`."""
        return _grain().MapDataset.source(self)

    def _fill(self, row, members):
        end, virtual = 0, len(self._front)
        for segment, member in enumerate(members, 1):
            ids, counted = self._examples[member]
            whole = slice(end, end + virtual + len(ids) - 1)
            place = slice(end + virtual, whole.stop)
            row["tokens"][whole] = np.concatenate([self._front, ids[:-1]])
            row["targets"][place] = ids[1:]
            row["weights"][place] = counted[1:]
            row["segment_ids"][whole] = segment
            row["positions"][whole] = np.arange(virtual + len(ids) - 1)
            if virtual:
                row["virtual_positions"][end : place.start] = np.arange(virtual)
            end = whole.stop

    def _row(self, row):
        """The examples in a row, counted through all epochs; none after the last."""
        with self._lock:
            while self._starts[-1] <= row and len(self._starts) - 1 != self._epochs:
                self._first_row(len(self._starts))
            if row >= self._starts[-1]:
                return []
            epoch = bisect.bisect_right(self._starts, row) - 1
            return self._rows_of(epoch)[row - self._starts[epoch]]

    def _first_row(self, epoch):
        while len(self._starts) <= epoch:
            rows = self._rows_of(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(rows))
        return self._starts[epoch]

    def _arrange(self, epoch):
        """The rows of an epoch, each a list of examples."""
        random = np.random.default_rng([self._seed, epoch])
        order = np.arange(len(self._examples))
        if self._shuffle:
            random.shuffle(order)
        if not self._pack:
            return [[int(i)] for i in order]
        virtual = len(self._front)
        lengths = (self._examples.lengths[order] + virtual).tolist()
        rows = pack(lengths, self._examples.context + virtual)
        if self._shuffle:
            # Rows that were begun early hold more of the small examples.
            random.shuffle(rows)
        return [[int(order[i]) for i in row] for row in rows]


def _in_front(virtual: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """The ids that stand in front of each example."""
    if isinstance(virtual, int | np.integer):
        ids, fits = np.zeros(max(virtual, 0)), virtual >= 0
    else:
        ids = np.asarray(virtual)
        fits = ids.ndim == 1
    if not fits:
        raise ValueError(
            f"`virtual` is a number of placeholders, or a sequence of ids; got {virtual!r}."
        )
    return ids.astype(np.int32)


def pack(lengths: list[int], context: int) -> list[list[int]]:
    """Best fit: each length, in order, into the fullest row that still has room for it.

    Args:
      lengths: Of the records, none above `context`.
      context: Length of a row.
    Returns:
      Rows of indices into `lengths`, each adding up to at most `context`.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context + 1)]  # row numbers by room left
    rooms = 0  # bit r is set where there is a row with room r
    for index, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        if room > length:  # a full row is looked for by no length, all are at least 1
            rooms |= 1 << (room - length)
    return rows


def _grain():
    return need("grain", "train", "iterating over data")
