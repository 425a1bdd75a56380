"""Data: records of files, chat templates, tokens, packing, and batches."""

from jaxpeft.data._examples import Batches, Chat, Completion, Examples, Text, read_examples
from jaxpeft.data._tokenizer import TextTokenizer, Tokens

__all__ = [
    "Batches",
    "Chat",
    "Completion",
    "Examples",
    "Text",
    "TextTokenizer",
    "Tokens",
    "read_examples",
]
