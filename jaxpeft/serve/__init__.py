"""Generation with a lifted model."""

from jaxpeft.serve._generate import Generated, generator, sample, seq2seq_generator

__all__ = ["Generated", "generator", "sample", "seq2seq_generator"]
