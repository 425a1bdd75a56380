"""What a process sees that is given a base folder and an adapter folder, and nothing else.

python examples/demo/reload.py BASE ADAPTER > logits.npy
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft.io import load_adapter
from jaxpeft.models import decoder


def logits(config: decoder.Config, tree) -> np.ndarray:
    """Of two rows of random tokens, the same in every process."""
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 64), np.int32)
    return np.asarray(jax.jit(jp.lift(decoder.pure(config)))(tree, jnp.asarray(tokens)))


if __name__ == "__main__":
    base, adapter = map(Path, sys.argv[1:])
    config, params = decoder.load(base, jnp.float32)
    loaded = load_adapter(adapter, params)
    np.save(sys.stdout.buffer, logits(config, jp.combine(loaded.frozen, loaded.adapter)))
