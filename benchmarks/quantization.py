"""What the formats cost and lose: python benchmarks/quantization.py --json

    bits_per_param    8 x bytes of all leaves of the quantized weights / their parameters, by
                      format, of SmolLM-135M's shape (offsets and padding included)
    rms_error         relative, by format, on Gaussian numbers and on the demo's base; beside
                      bitsandbytes' own where it is installed and has the format
    step_time_vs_lora QLoRA's step (nf4+dq) over LoRA's on the same shape, medians of steps taken
                      in turn on this machine's CPU, without and with remat; compilation apart
    train_gib         [size][policy]: a whole QLoRA step of 7B to 65B compiled for a TPU without
                      one, by quantization_tpu.py (environment of `make tpu-check`), which keeps
                      what it has compiled in results/

About 5 minutes on 2 idle cores, and half an hour more where nothing is compiled for TPUs yet. The
last line is JSON; a full run is kept in results/quantization.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from jaxpeft._view import is_view
from jaxpeft.models import decoder
from jaxpeft.quant import FORMATS
from jaxpeft.train import cross_entropy, init, train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantization.json"
SMOLLM = decoder.Config(49152, 576, 1536, 30, 9, 3, 64, tied=True, context=256)
BATCH, LENGTH, RANK = 4, 256, 8
BITSANDBYTES = {"nf4": ("nf4", False), "nf4+dq": ("nf4", True),
                "fp4": ("fp4", False), "fp4+dq": ("fp4", True)}  # fmt: skip


def matrices(config):
    """Shapes of the parameters, and the sites of those that are quantized."""
    params = jax.eval_shape(lambda key: decoder.init(config, key, jnp.float32), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return params, jp.sites(decoder.pure(config), params, tokens).hidden


def bits_per_param():
    params, sites = matrices(SMOLLM)
    count = sum(int(np.prod(site.shape)) for site in sites.values())
    bits = {}
    for format in FORMATS:
        tree = jax.eval_shape(jp.quantize(format, sites), jax.random.key(0), params)
        views = [x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x)]
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(views))
        bits[format] = 8 * size / count
    return bits


def rms_error():
    config, params = decoder.load(ROOT / "examples" / "demo" / "base", jnp.float32)
    _, sites = matrices(config)
    flat = {jax.tree_util.keystr(k, simple=True, separator="/"): v
            for k, v in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    real = [layer for path in sites for layer in flat[path]]  # (in, out) each
    gaussian = [jax.random.normal(jax.random.key(0), (1024, 1024))]
    found = {}
    for format in FORMATS:
        found[format] = {
            name: {"ours": relative(FORMATS[format], ws), "bitsandbytes": theirs(format, ws)}
            for name, ws in (("gaussian", gaussian), ("real", real))
        }
    return found


def relative(encode, weights):
    """Root mean square of the error over that of the weights."""
    lost = sum(float(jnp.sum((encode(w).materialize() - w) ** 2)) for w in weights)
    return (lost / sum(float(jnp.sum(w**2)) for w in weights)) ** 0.5


def theirs(format, weights):
    """The same by bitsandbytes, or `None`."""
    if format not in BITSANDBYTES:
        return None
    try:
        import bitsandbytes.functional as bnb
        import torch
    except ImportError:
        return None
    kind, double = BITSANDBYTES[format]
    lost = 0.0
    for w in weights:
        w = np.ascontiguousarray(np.asarray(w).T)
        codes, state = bnb.quantize_4bit(
            torch.tensor(w), blocksize=64, quant_type=kind, compress_statistics=double
        )
        lost += float(((bnb.dequantize_4bit(codes, state).numpy() - w) ** 2).sum())
    return (lost / sum(float(jnp.sum(w**2)) for w in weights)) ** 0.5


def step_of(format, params, tokens, remat):
    """A compiled step and its arguments."""
    forward = jp.lift(decoder.pure(SMOLLM, remat="full" if remat else None), materialize="error")
    sites = jp.sites(decoder.pure(SMOLLM), params, tokens)
    method = jp.lora(RANK, sites.hidden)
    if format is not None:
        method = jp.chain(jp.quantize(format, sites.hidden), method)
    frozen, adapter = jp.split(method(jax.random.key(0), params))

    def loss(adapter, frozen, batch, key):
        logits = forward(jp.combine(frozen, adapter), batch["tokens"])
        return cross_entropy(logits, batch["targets"], jnp.ones(batch["targets"].shape))

    step = jax.jit(train_step(loss, optax.adamw(1e-4)))
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)}
    args = (init(adapter, optax.adamw(1e-4)), frozen, batch, None)
    return step.lower(*args).compile(), args


def step_time_vs_lora(rounds):
    params = decoder.init(SMOLLM, jax.random.key(0), jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, SMOLLM.vocab)
    ratios = {}
    for remat in (False, True):
        steps = [step_of(format, params, tokens, remat) for format in (None, "nf4+dq")]
        seconds = [[], []]
        for _ in range(rounds + 1):
            for taken, (step, args) in zip(seconds, steps, strict=True):
                begin = time.perf_counter()
                jax.block_until_ready(step(*args))
                taken.append(time.perf_counter() - begin)
        # The first round warms up. Neighbours in time have seen the same load.
        pairs = [
            qlora / lora for lora, qlora in zip(*(taken[1:] for taken in seconds), strict=True)
        ]
        ratios["remat" if remat else "no remat"] = statistics.median(pairs)
    return ratios


def train_gib():
    """What quantization_tpu.py has compiled or compiles now; nothing without its environment."""
    python = ROOT / ".venv-tpu" / "bin" / "python"
    if not python.exists():
        return {"train_gib": None}
    places = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    done = subprocess.run(
        [python, ROOT / "benchmarks" / "quantization_tpu.py"],
        env=os.environ | places, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed")
    parser.add_argument("--no-tpu", action="store_true", help="leave train_gib out")
    options = parser.parse_args()
    result = {"bits_per_param": bits_per_param(), "rms_error": rms_error()}
    if not options.json:
        print(json.dumps(result, indent=1), flush=True)
    result["step_time_vs_lora"] = step_time_vs_lora(options.rounds)
    result |= {"train_gib": None} if options.no_tpu else train_gib()
    if not options.no_tpu:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
