"""A task: a model with a head, arrays of examples, and a score.

A score is a function of sums over examples, so an example's share in it is a few numbers: how a
difference of two methods varies with the examples that happened to be asked is then a matter of
drawing rows of (N, S).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from comparison import files
from jaxpeft.models import decoder, encoder, heads

#: The last is the longest sequence; a batch of shorter ones is cut to one of the others. Questions
#: and commands have 12 tokens on average.
LENGTHS = {"minilm": (24, 32, 48), "stories260k": (160,)}
BATCH = {"minilm": 32, "stories260k": 16}
MEANINGS = 200  # how many meaning representations are put into words
MAX_NEW = 112  # tokens of a sentence; of the references, 2 in 100 are longer
POOL = "mean"  # MiniLM's pooler is untrained


class Base(NamedTuple):
    """A pretrained model without a head."""

    name: str
    config: Any
    params: Any
    tokenizer: Tokenizer
    trunk: Callable  # hidden states (B, T, D)
    unrolled: Callable  # the same without a loop, of which XLA counts one round


class Split(NamedTuple):
    """Examples as arrays: tokens and mask (N, T), labels (N,) or (N, T)."""

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.tokens)

    def rows(self, at: np.ndarray) -> "Split":
        """The examples at these places."""
        return Split(*(x[at] for x in self))

    def upto(self, length: int) -> "Split":
        """The first tokens of all examples."""
        return Split(*(x[:, :length] if x.ndim == 2 else x for x in self))


class Questions(NamedTuple):
    """What is asked of a trained model, and what its answers are compared with."""

    split: Split  # the loss is on all of it
    answers: Any  # for `Task.outcomes`


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a method is trained and scored on.

    Attributes:
      name: As in the results.
      base: Its model.
      head: Its head.
      new_head: `new_head(key)`, the head's parameters before the first step.
      head_paths: Patterns of what is trained with the head, whatever the method.
      train: The examples to train on.
      questions: By part, "validation" (where there is one) and "test".
      outcomes: `outcomes(run, answers) -> (N, S)`; a run can `predict` and `write`.
      metric: Which of METRICS the outcomes add up to.
      dropped: How many sentences of train stood in test.
    """

    name: str
    base: Base
    head: heads.Head
    new_head: Callable[[jax.Array], Any]
    head_paths: tuple[str, ...]
    train: Split
    questions: Mapping[str, Questions]
    outcomes: Callable[[Any, Any], np.ndarray]
    metric: str
    dropped: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that batches are cut to."""
        return LENGTHS[self.base.name]

    @property
    def rows(self) -> int:
        """Sequences of a batch."""
        return BATCH[self.base.name]

    def score(self, total: np.ndarray) -> np.ndarray:
        """The score (...) of a sum over outcomes (..., S), out of 100."""
        return METRICS[self.metric](total)

    def params(self, seed: int) -> Any:
        """Trunk and head before training."""
        return {"trunk": self.base.params, "head": self.new_head(jax.random.key(seed))}


@functools.cache
def base(name: str) -> Base:
    """A model of the data folder, in float32."""
    folder = files.find({"minilm": "minilm-l6"}.get(name, name))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if name == "minilm":
        config, params = encoder.load(folder, jnp.float32)
        params.pop("pooler", None)  # untrained, and read by nothing here
        config = dataclasses.replace(config, pooler=False)
        trunks = (encoder.pure(config), encoder.pure(config, unroll=config.layers))
    else:
        config, params = decoder.load(folder, jnp.float32)
        # Also to train with: the arrays that a loop saves for its backward pass are a quarter of
        # the step of so small a model.
        trunks = (decoder.pure(config, "hidden", unroll=config.layers),) * 2
    return Base(name, config, params, tokenizer, *trunks)


# Classes -----------------------------------------------------------------------------------------


def accuracy(total: np.ndarray) -> np.ndarray:
    """Of (right, asked)."""
    return 100 * total[..., 0] / total[..., 1]


def trec() -> Task:
    """Six kinds of question."""
    return _classes("trec", files.trec())


def banking77() -> Task:
    """Seventy-seven intents, on which tuning gains little over a probe: a parity row."""
    return _classes("banking77", files.banking77())


def _classes(name: str, parts: files.Parts) -> Task:
    minilm = base("minilm")
    classes = sorted({example.label for example in parts.train})

    def split(examples: Sequence) -> Split:
        tokens, mask = padded(
            [minilm.tokenizer.encode(x.text).ids for x in examples], LENGTHS["minilm"][-1]
        )
        labels = [classes.index(x.label) for x in examples]
        return Split(tokens, mask, np.asarray(labels, np.int32))

    def outcomes(run: Any, answers: Split) -> np.ndarray:
        """(right, 1)."""
        right = run.predict(answers)[0] == answers.labels
        return np.stack([right, np.ones_like(right)], axis=-1).astype(np.int32)

    test = split(parts.test)
    head = heads.sequence_classification(minilm.config.width, len(classes), pool=POOL)
    return Task(
        name=name,
        base=minilm,
        head=head,
        new_head=head.init,
        head_paths=("head/*",),
        train=split(parts.train),
        questions={"test": Questions(test, test)},
        outcomes=outcomes,
        metric="accuracy",
        dropped=parts.dropped,
    )


# Tags --------------------------------------------------------------------------------------------


class Gold(NamedTuple):
    """The tags of sentences, and where their words begin among the tokens."""

    split: Split
    tags: list[tuple[str, ...]]
    starts: list[list[int]]  # of the words that were not cut off


def snips() -> Task:
    """Slots: a tag at the first token of each word, IGNORED elsewhere; spans are compared."""
    minilm, parts = base("minilm"), files.snips()
    tags = sorted({tag for example in parts.train for tag in example.tags})
    number = {tag: i for i, tag in enumerate(tags)}

    def questions(examples: Sequence) -> Questions:
        encoded = [minilm.tokenizer.encode(list(x.words), is_pretokenized=True) for x in examples]
        tokens, mask = padded([x.ids for x in encoded], LENGTHS["minilm"][-1])
        labels = np.full(tokens.shape, heads.IGNORED, np.int32)
        starts = []
        for row, (example, x) in enumerate(zip(examples, encoded, strict=True)):
            at = [t for t in first_tokens(x.word_ids) if t < tokens.shape[1]]
            # A tag that no training sentence has is never predicted: a miss.
            labels[row, at] = [number.get(tag, heads.IGNORED) for tag in example.tags[: len(at)]]
            starts.append(at)
        split = Split(tokens, mask, labels)
        return Questions(split, Gold(split, [x.tags for x in examples], starts))

    def outcomes(run: Any, gold: Gold) -> np.ndarray:
        """Spans (right, predicted, true)."""
        predicted = run.predict(gold.split)[0]
        rows = []
        for row, (true, at) in enumerate(zip(gold.tags, gold.starts, strict=True)):
            said = [tags[i] for i in predicted[row, at]]
            rows.append(span_counts(said + ["O"] * (len(true) - len(said)), true))
        return np.asarray(rows, np.int32)

    head = heads.token_classification(minilm.config.width, len(tags))
    return Task(
        name="snips",
        base=minilm,
        head=head,
        new_head=head.init,
        head_paths=("head/*",),
        train=questions(parts.train).split,
        questions={"validation": questions(parts.validation), "test": questions(parts.test)},
        outcomes=outcomes,
        metric="span F1",
        dropped=parts.dropped,
    )


def f1(total: np.ndarray) -> np.ndarray:
    """Of spans (right, predicted, true)."""
    return 200 * total[..., 0] / np.maximum(total[..., 1] + total[..., 2], 1)


def first_tokens(words: Sequence[int | None]) -> list[int]:
    """Where each word begins, from the word of each token."""
    return [t for t, w in enumerate(words) if w is not None and (t == 0 or words[t - 1] != w)]


def span_counts(said: Sequence[str], true: Sequence[str]) -> tuple[int, int, int]:
    """How many spans of a sentence are right, predicted and true, as seqeval counts them."""
    from seqeval.metrics.sequence_labeling import get_entities

    found, wanted = set(get_entities(list(said))), set(get_entities(list(true)))
    return len(found & wanted), len(found), len(wanted)


# Text --------------------------------------------------------------------------------------------


class Meanings(NamedTuple):
    """What is to be said, and sentences that say it."""

    prompts: list[list[int]]
    references: list[list[str]]


def e2e() -> Task:
    """'<s>meaning\\n sentence</s>': the loss is on all of it, BLEU on what follows the meaning."""
    stories, parts = base("stories260k"), files.e2e()
    eos = stories.config.eos[0]

    def questions(examples: Sequence) -> Questions:
        texts = [[*stories.tokenizer.encode(f"{x.meaning}\n {x.text}").ids, eos] for x in examples]
        tokens, mask = padded(texts, LENGTHS["stories260k"][-1])
        split = Split(tokens, mask, np.where(mask, tokens, heads.IGNORED).astype(np.int32))
        said: dict[str, list[str]] = {}
        for example in examples:
            said.setdefault(example.meaning, []).append(example.text)
        # Spread over the file, in which short meanings come first.
        at = np.linspace(0, len(said) - 1, min(MEANINGS, len(said))).astype(int)
        chosen = [list(said)[i] for i in at]
        prompts = [stories.tokenizer.encode(f"{meaning}\n").ids for meaning in chosen]
        return Questions(split, Meanings(prompts, [said[meaning] for meaning in chosen]))

    def outcomes(run: Any, meanings: Meanings) -> np.ndarray:
        """Matching n-grams (4), n-grams (4), and lengths of text and closest reference."""
        written = [stories.tokenizer.decode(ids) for ids in run.write(meanings.prompts)]
        pairs = zip(written, meanings.references, strict=True)
        return np.asarray([ngram_counts(text, references) for text, references in pairs], np.int32)

    head = heads.causal_lm(stories.config.width, stories.config.vocab)
    table = stories.params["embed"]["embedding"]
    return Task(
        name="e2e",
        base=stories,
        head=head,
        # The base's own head, untied: no key changes it.
        new_head=lambda key: {"kernel": jnp.copy(table.T)},
        head_paths=("head/*", "trunk/norm/scale"),
        train=questions(parts.train).split,
        questions={"validation": questions(parts.validation), "test": questions(parts.test)},
        outcomes=outcomes,
        metric="BLEU",
        dropped=parts.dropped,
    )


def ngram_counts(text: str, references: Sequence[str]) -> list[int]:
    """What a sentence adds to the corpus's BLEU, as sacrebleu counts it."""
    found = _bleu().sentence_score(text, list(references))
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def bleu(total: np.ndarray) -> np.ndarray:
    """sacrebleu's BLEU of summed counts (..., 10)."""
    total = np.asarray(total)

    def one(row: np.ndarray) -> float:
        row = [int(x) for x in row]
        return _bleu().compute_bleu(row[:4], row[4:8], row[8], row[9]).score

    return np.apply_along_axis(one, -1, total)


@functools.cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)  # of single sentences; their counts do not depend on it


# Arrays ------------------------------------------------------------------------------------------


def padded(ids: Sequence[Sequence[int]], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask (N, longest), padded on the right with 0; what is longer is cut."""
    tokens = np.zeros((len(ids), longest), np.int32)
    mask = np.zeros((len(ids), longest), bool)
    for row, x in enumerate(ids):
        x = x[:longest]
        tokens[row, : len(x)], mask[row, : len(x)] = x, True
    return tokens, mask


TASKS = {"snips": snips, "e2e": e2e, "trec": trec, "banking77": banking77}
METRICS = {"accuracy": accuracy, "span F1": f1, "BLEU": bleu}
