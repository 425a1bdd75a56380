"""A small run in a process of its own, to be killed and started again.

python resumable.py FOLDER STEPS
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy

from jaxpeft import train


class Stream:
    """Batches without end, at a position that can be kept and set."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return toy.batch(4, 6, seed=self.position, dtype=np.float32)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def main(folder, steps, **options):
    adapter, frozen = toy.model(jnp.float32)
    return train.fit(
        toy.noisy_loss_fn,
        optax.adamw(optax.cosine_decay_schedule(1e-2, 100)),
        adapter,
        frozen,
        Stream(),
        steps=steps,
        key=jax.random.key(1),
        accumulate=2,
        clip=1.0,
        held_out=[toy.batch(4, 6, seed=1000, dtype=np.float32)],
        eval_every=5,
        folder=folder,
        save_every=3,
        **options,
    )


if __name__ == "__main__":
    with train.one_line_errors():
        finished = main(sys.argv[1], int(sys.argv[2])).finished
    print("finished" if finished else "stopped")
