"""A run that is killed anywhere ends with the bytes of one that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jaxpeft import train

STEPS = 40


def start(folder):
    """Float32, one device: what the tests' own process is set to is not handed on."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("resumable.py"), folder, str(STEPS)],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip(), err) == (0, "finished", "")


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def half_written(folder):
    return list(folder.glob("*.orbax-checkpoint-tmp*"))


def end_of(folder):
    """Every byte that a run is answerable for."""
    adapter, _ = toy.model(jnp.float32)
    like = train.init(adapter, optax.adamw(optax.cosine_decay_schedule(1e-2, 100)))
    with train.Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
        state, run = checkpoints.restore(like)
    arrays = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(state)}
    content = {k: (x.dtype, np.asarray(x).tobytes()) for k, x in arrays.items()}
    return content, run, steps, (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_stopped")
    finish(start(folder))
    content, run, steps, metrics = end_of(folder)
    assert steps[-1] == STEPS and len(steps) == 3
    assert run == {"data": {"position": STEPS}, "evaluated_at": STEPS}
    assert metrics.count(b"\n") == STEPS + STEPS // 5 + 1
    return content, run, steps, metrics


def test_sigkill_at_random_instants_and_inside_a_save(tmp_path, never_stopped):
    instants = random.Random(0)
    for inside_save in (False, True):
        seen = lines(tmp_path)
        wanted = seen + instants.randrange(2, 12)
        process = start(tmp_path)
        while lines(tmp_path) < wanted:  # on resuming it first gets shorter
            time.sleep(0.001)
            assert process.poll() is None, process.communicate()
        if inside_save:
            while not half_written(tmp_path):
                assert process.poll() is None, "the run ended without another save"
        else:
            time.sleep(instants.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not inside_save or half_written(tmp_path), "the kill came after the save"
    assert 0 < lines(tmp_path) < STEPS
    finish(start(tmp_path))
    assert not half_written(tmp_path)
    assert end_of(tmp_path) == never_stopped
