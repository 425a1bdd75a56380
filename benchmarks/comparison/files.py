"""The data folder: its texts as they are on disk."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Labelled(NamedTuple):
    """A text and its class."""

    text: str
    label: str


class Tagged(NamedTuple):
    """Words and a BIO tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


class Described(NamedTuple):
    """A meaning representation and a sentence that says it."""

    meaning: str
    text: str


class Parts(NamedTuple):
    """The parts of a data set, and how many examples of train stood in test too."""

    train: list
    validation: list
    test: list
    dropped: int


def folder() -> Path:
    """The data folder: JAXPEFT_DATA, or what lies beside the project."""
    return Path(os.environ.get("JAXPEFT_DATA") or ROOT.parent / "shared" / "data")


def find(path: str) -> Path:
    """A file or folder of the data.

    Raises:
      FileNotFoundError: It is not there; says where it was looked for.
    """
    found = folder() / path
    if not found.exists():
        raise FileNotFoundError(
            f"The benchmark needs '{path}', which is not in '{folder()}'. Set JAXPEFT_DATA to the "
            "folder with minilm-l6, stories260k, trec, snips, e2e_nlg and banking77 as their "
            "publishers give them (the models as Hugging Face folders with tokenizer.json)."
        )
    return found


def trec() -> Parts:
    """Questions and their 6 coarse classes. There is no validation part."""

    def read(name: str) -> list[Labelled]:
        lines = find(f"trec/TREC.{name}").read_text("latin-1").splitlines()
        return [Labelled(line.split(" ", 1)[1], line.split(":", 1)[0]) for line in lines if line]

    return without_overlap(read("train"), [], read("test"))


def snips() -> Parts:
    """Sentences and their slots."""

    def read(name: str) -> list[Tagged]:
        words, tags = (
            find(f"snips/{name}/{file}").read_text().splitlines() for file in ("seq.in", "seq.out")
        )
        pairs = zip(words, tags, strict=True)
        return [Tagged(tuple(w.split()), tuple(t.split())) for w, t in pairs if w.strip()]

    return without_overlap(read("train"), read("valid"), read("test"))


def banking77() -> Parts:
    """Customers' questions and their 77 intents. There is no validation part."""

    def read(name: str) -> list[Labelled]:
        return [Labelled(row["text"], row["category"]) for row in rows(f"banking77/{name}.csv")]

    return without_overlap(read("train"), [], read("test"))


def e2e() -> Parts:
    """Restaurants: meaning representations and sentences, several for each in all parts."""

    def read(name: str) -> list[Described]:
        return [Described(shorter(row["mr"]), row["ref"]) for row in rows(f"e2e_nlg/{name}.csv")]

    return without_overlap(read("trainset"), read("devset"), read("testset_w_refs"))


def rows(path: str) -> Iterable[dict[str, str]]:
    """The rows of a CSV file by column."""
    with open(find(path), encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


#: The attributes whose values need a word to be understood.
_NAMED = {"familyFriendly": "kids", "near": "near"}


def shorter(meaning: str) -> str:
    """'name[The Mill], eatType[pub], near[Zizzi]' as 'The Mill, pub, near Zizzi'.

    The base's vocabulary of 512 spells the attributes out letter by letter: with them, half of
    the examples would not fit in 160 tokens.
    """
    pairs = re.findall(r"([^,\[\]]+)\[([^\]]*)\]", meaning)
    return ", ".join(f"{_NAMED.get(name.strip(), '')} {value}".strip() for name, value in pairs)


def without_overlap(train: Sequence, validation: Sequence, test: Sequence) -> Parts:
    """Drops the examples of train whose text stands in test, letters and digits compared."""
    seen = {_letters(example.text) for example in test}
    kept = [example for example in train if _letters(example.text) not in seen]
    return Parts(kept, list(validation), list(test), len(train) - len(kept))


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
