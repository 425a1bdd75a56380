"""Training data: from records in a file to batches of numpy arrays, through grain.

Everything is read, checked and tokenized before the first step, so an error in the last line
is reported at once, and the number of steps is known. A batch is a function of its number and
the seed alone: the position in the data is one integer, and a run that is resumed there
continues with the same batches.
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
    """Records with a prompt and its completion. The loss is on the completion and its end token.

    Both are tokenized as one text. A token that spans the border of the two belongs to the
    completion.

    Attributes:
      prompt, completion: Names of the fields.
      separator: Written between the two, part of the prompt.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    separator: str = ""

    def tokens(self, record: Record, tokenizer: TextTokenizer) -> Tokens:
        prompt = record.text(self.prompt) + self.separator
        text = prompt + record.text(self.completion)
        return tokenizer.encode(text, [(len(prompt), len(text))])


@dataclass(frozen=True)
class Chat:
    """Records with a conversation. The loss is on the turns of the assistant.

    Attributes:
      messages: Name of the field with the list of messages, each with `role` and `content`.
      tools: Name of the field that is passed to the chat template as `tools`, in records that
        have it.
    """

    messages: str = "messages"
    tools: str = "tools"

    def tokens(self, record: Record, tokenizer: TextTokenizer) -> Tokens:
        messages = record.value(self.messages)
        self._check(record, messages)
        try:
            tokens = tokenizer.encode_chat(messages, record.fields.get(self.tools))
        except TemplateError as error:
            raise record.error(str(error)) from error
        if not tokens.loss_mask.any():
            raise record.error(f"field {self.messages!r} has no assistant turn to train on.")
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
                # A list of parts (text, images) is left to the template.
                if not (content and isinstance(content, list)):
                    nested.text(f"{place}.content")


@dataclass(frozen=True)
class Text:
    """Records with plain text. The loss is on all of it.

    Attributes:
      text: Name of the field.
    """

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
        f"the record has none of the fields 'messages', 'prompt', 'text'; it has: {there}. Pass "
        f"`fields`, with their names: Completion(prompt=..., completion=...), Chat(messages=...) "
        f"or Text(text=...)."
    )


class Examples:
    """Tokenized records, each of which fits into one row of a batch.

    Args:
      examples: In the order of the file.
      max_length: Length of a row. An example has up to one token more, since its last token is a
        target only.
      on_overflow: What happens to longer records: "truncate" keeps the beginning, "drop" leaves
        them out, "split" makes several examples of them, in which every token is a target once.
      source: What messages call these data.
    Attributes:
      num_records: Records that were given.
      num_overflowing: Records among them that are longer than `max_length`.
      num_dropped: Records that were left out: too long, or without a target token.
    Raises:
      UserError: where no example is left.
      ValueError: for an option out of its range.
    """

    def __init__(
        self,
        examples: list[Tokens],
        *,
        max_length: int,
        on_overflow: str = "truncate",
        source: Any = "data",
    ):
        if max_length < 1:
            raise ValueError(f"`max_length` is a number of tokens, at least 1; got {max_length}.")
        if on_overflow not in ("truncate", "drop", "split"):
            raise ValueError(
                f'`on_overflow` is "truncate", "drop" or "split", got {on_overflow!r}.'
            )
        self.max_length = max_length
        self.on_overflow = on_overflow
        self.source = source
        self.num_records = len(examples)
        self.num_overflowing = 0
        self.num_dropped = 0
        kept: list[Tokens] = []
        for example in examples:
            pieces = [x for x in self._fitted(example) if x.loss_mask[1:].any()]
            self.num_dropped += not pieces
            kept += pieces
        if not kept:
            raise UserError(
                f"{source}: no example is left to train on. {self.summary()} Raise `max_length`, "
                f'or pass on_overflow="split".'
            )
        # One array for all: a list of small ones takes several times the memory.
        self._ids = np.concatenate([example.ids for example in kept])
        self._loss_mask = np.concatenate([example.loss_mask for example in kept])
        self._ends = np.cumsum([0, *(len(example.ids) for example in kept)])
        if self.num_overflowing or self.num_dropped:
            _log.warning("%s: %s", source, self.summary())

    def _fitted(self, example):
        """The example as it is where it fits, else what `on_overflow` makes of it."""
        size = self.max_length + 1
        if len(example.ids) <= size:
            return [example]
        self.num_overflowing += 1
        if self.on_overflow == "drop":
            return []
        stop = len(example.ids) - 1 if self.on_overflow == "split" else 1
        cuts = [slice(start, start + size) for start in range(0, stop, self.max_length)]
        return [Tokens(example.ids[cut], example.loss_mask[cut]) for cut in cuts]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Tokens:
        where = slice(self._ends[index], self._ends[index + 1])
        return Tokens(self._ids[where], self._loss_mask[where])

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each example takes in a row: its tokens but the last, at least 1."""
        return np.diff(self._ends) - 1

    @property
    def num_target_tokens(self) -> int:
        """Target tokens, those that have a loss, in one pass over the examples."""
        firsts = self._loss_mask[self._ends[:-1]]
        return int(self._loss_mask.sum() - firsts.sum())

    def summary(self) -> str:
        """How many records were truncated, split or dropped, in one line."""
        done = {"truncate": "truncated", "drop": "dropped", "split": "split"}
        return (
            f"{self.num_overflowing} of {self.num_records} records are longer than "
            f"{self.max_length} tokens and were {done[self.on_overflow]}; {self.num_dropped} were "
            f"dropped in all, too long or without a target token."
        )


def read_examples(
    file: str | Path,
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    fields: Fields | None = None,
    on_overflow: str = "truncate",
) -> Examples:
    """Reads and tokenizes a .jsonl or .csv file.

    Args:
      file: One record a line, or a row.
      tokenizer: Tokenizer of the model's folder.
      max_length: Length of a row of a batch, in tokens.
      fields: `Completion`, `Chat` or `Text`, with the names of the fields in this file.
        `None` decides by the fields of the first record: messages, else prompt, else text.
      on_overflow: What happens to longer records: "truncate", "drop" or "split", see `Examples`.
        Where there are any, a warning is logged with their number.
    Returns:
      The examples, in the order of the file.
    Raises:
      UserError: for whatever is wrong with the file, naming file, line and field.
    """
    examples = []
    for record in read_records(file):
        fields = fields or _fields_of(record)
        examples.append(fields.tokens(record, tokenizer))
    if not examples:
        raise UserError(f"{file} has no records.")
    return Examples(examples, max_length=max_length, on_overflow=on_overflow, source=file)


class Batches:
    """Batches of examples, by number: a source for grain, and iterable through it.

    Each batch is a dict of arrays of shape (rows, max_length):

    - `tokens` int32
    - `targets` int32: at each position, the token that follows
    - `weights` float32: 1 where the target has a loss, else 0
    - `segment_ids` int32: 1, 2, ... for the examples of a row, 0 for padding
    - `positions` int32: from 0 in each example

    With `virtual_tokens`, each example has virtual tokens of its own in front of it, in its segment
    and its positions. Rows are longer by as many positions, and there is one more array:

    - `virtual_positions` int32: 0, 1, ... at virtual tokens, -1 at real ones; pass it to `combine`

        batches = Batches(examples, batch_size=8, num_epochs=3)
        len(batches)               # steps of three epochs
        iter(batches)              # a grain iterator, with get_state and set_state
        batches.dataset().map(f)   # a grain.MapDataset, for further transformations

    Args:
      examples: What to train on.
      batch_size: Rows of a batch, over all processes together.
      pack: Whether several examples share a row where they fit; else there is one, and padding.
      shuffle: Whether each epoch has another order; else it is the order of the file (packed rows
        follow it only roughly).
      seed: Seed of the orders.
      num_epochs: Passes over the examples, `None` for no end. The last batch is filled up with
        padding, so that all batches have one shape.
      shard: `(index, count)` of this process where several each make their part of a batch,
        as `jax.make_array_from_process_local_data` takes them.
      virtual_tokens: The number of placeholders in front of each example, for a prefix, or the ids
        in front of it, for a prompt (`jp.prompts.virtual_token_ids`).
    Raises:
      ValueError: for an option out of its range.
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
        num_epochs: int | None = None,
        shard: tuple[int, int] = (0, 1),
        virtual_tokens: int | Sequence[int] | np.ndarray = 0,
    ):
        index, count = shard
        if batch_size < 1:
            raise ValueError(f"`batch_size` is a number of rows, at least 1; got {batch_size}.")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"`num_epochs` is at least 1, or None for no end; got {num_epochs}.")
        if not 0 <= index < count or batch_size % count:
            raise ValueError(
                f"`shard=(index, count)` needs an index below the count and a count that divides "
                f"`batch_size`; got {shard} and {batch_size}."
            )
        self._front = _ids_in_front(virtual_tokens)
        self._examples = examples
        self._batch_size = batch_size
        self._pack = pack
        self._shuffle = shuffle
        self._seed = seed
        self._epochs = num_epochs
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
        shape = (rows, self._examples.max_length + len(self._front))
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
        # One thread and few batches ahead suffice: a batch is assembled in microseconds.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(self.dataset().to_iter_dataset(options))

    def dataset(self) -> Any:
        """These batches as a `grain.MapDataset`."""
        return _grain().MapDataset.source(self)

    def _fill(self, row, members):
        end, virtual = 0, len(self._front)
        for segment, member in enumerate(members, 1):
            ids, loss_mask = self._examples[member]
            whole = slice(end, end + virtual + len(ids) - 1)
            real = slice(end + virtual, whole.stop)
            row["tokens"][whole] = np.concatenate([self._front, ids[:-1]])
            row["targets"][real] = ids[1:]
            row["weights"][real] = loss_mask[1:]
            row["segment_ids"][whole] = segment
            row["positions"][whole] = np.arange(virtual + len(ids) - 1)
            if virtual:
                row["virtual_positions"][end : real.start] = np.arange(virtual)
            end = whole.stop

    def _row(self, row):
        """The examples of a row, numbered through all epochs; none after the last epoch."""
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
        rows = pack(lengths, self._examples.max_length + virtual)
        if self._shuffle:
            # Rows that were started early hold more of the short examples.
            random.shuffle(rows)
        return [[int(order[i]) for i in row] for row in rows]


def _ids_in_front(virtual_tokens: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """The ids in front of each example."""
    if isinstance(virtual_tokens, int | np.integer):
        ids, valid = np.zeros(max(virtual_tokens, 0)), virtual_tokens >= 0
    else:
        ids = np.asarray(virtual_tokens)
        valid = ids.ndim == 1
    if not valid:
        raise ValueError(
            f"`virtual_tokens` is a number of placeholders, or a sequence of ids; got "
            f"{virtual_tokens!r}."
        )
    return ids.astype(np.int32)


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit packing: each length, in order, goes into the fullest row with room for it.

    Args:
      lengths: Lengths of the examples, none above `max_length`.
      max_length: Length of a row.
    Returns:
      Rows of indices into `lengths`, each adding up to at most `max_length`.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # row numbers by room left
    rooms = 0  # bit r is set where there is a row with room r
    for index, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        if room > length:  # a full row fits no other length, since all are at least 1
            rooms |= 1 << (room - length)
    return rows


def _grain():
    return need("grain", "train", "iterating over data")
