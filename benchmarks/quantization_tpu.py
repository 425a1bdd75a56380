"""Bytes of one QLoRA step, compiled for a TPU without one.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost \\
        .venv-tpu/bin/python benchmarks/quantization_tpu.py

Llama shapes from 7B to 65B, from shapes alone: the hidden matrices in NF4 with double quantization,
embeddings, head and norms in bfloat16, LoRA of rank 64 on all hidden matrices, adapter and
gradients in bfloat16, one row of 512 tokens, every layer computed again in the backward pass.
A step is loss, gradient, clipping and AdamW, with moments

    fp32     in float32
    8bit     in 8 bits (`adamw8bit`)
    paged    in float32 in the host's memory (`paged`); what the host holds is counted apart
    kernel   in 8 bits, and products by the kernel of `quant._kernels`, which is off by default

GiB are arguments + temporaries + outputs - aliased. The CPU backend's figure stands beside that of
the TPU: it computes bf16 products in fp32, and its host memory is its device memory. The last line
is one JSON object. A compile takes up to two minutes and 2 GB; `--sizes`, `--policies` and
`--chips` choose, what has been compiled before is kept. `--kernel` compiles the kernel alone.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import time
from pathlib import Path

# Without this the CPU's figures measure the scheduler. To be said before the backend starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from measured import stamp  # noqa: E402

import jaxpeft as jp  # noqa: E402
from jaxpeft.models import decoder  # noqa: E402
from jaxpeft.optim import adamw8bit, paged, to_host  # noqa: E402
from jaxpeft.quant import nf4  # noqa: E402
from jaxpeft.quant._kernels import nf4_matmul  # noqa: E402
from jaxpeft.quant._kernels.fused import fused  # noqa: E402
from jaxpeft.train import cross_entropy, init, train_step  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "quantization_tpu.json"
GIB = 2**30
RANK, LENGTH = 64, 512
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "cpu": None}  # of 95 and 16 GB


def llama(width, mlp_width, layers):
    heads = width // 128
    return decoder.Config(32000, width, mlp_width, layers, heads, heads, 128)


CONFIGS = {
    "7B": llama(4096, 11008, 32),
    "13B": llama(5120, 13824, 40),
    "33B": llama(6656, 17920, 60),
    "65B": llama(8192, 22016, 80),
}
PARAMETERS = {
    "7B": 6_738_415_616,
    "13B": 13_015_864_320,
    "33B": 32_528_943_616,
    "65B": 65_285_660_672,
}


def wide_adamw():
    """AdamW with moments in float32; optax gives them the dtype of the parameters.

    Updates keep that of the parameters.
    """
    tx = optax.adamw(2e-4)

    def widen(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params):
        updates, state = tx.update(widen(updates), state, widen(params))
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optax.GradientTransformation(lambda params: tx.init(widen(params)), update)


POLICIES = {
    "fp32": wide_adamw,
    "8bit": lambda: adamw8bit(2e-4),
    "paged": lambda: paged(wide_adamw()),
    "kernel": lambda: adamw8bit(2e-4),
}
MOMENTS = ("fp32", "8bit", "paged")
PRODUCTS = [  # tokens, in, out, dtype; the second and third need tiles beyond their axes
    (512, 4096, 11008, jnp.bfloat16),
    (512, 11008, 4096, jnp.bfloat16),
    (100, 704, 600, jnp.bfloat16),
    (512, 4096, 4096, jnp.float32),
]


def qlora(config):
    """The shapes of (frozen, adapter), and the loss of a batch."""
    forward = decoder.apply_fn(config, remat="full")
    shapes = decoder.shapes(config, jnp.bfloat16)
    sites = jp.sites(forward, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jp.chain(
        jp.quantize("nf4+dq", sites.hidden),
        jp.lora(RANK, sites.hidden, alpha=16, dtype=jnp.bfloat16),
    )
    split = jax.eval_shape(
        lambda key, params: jp.split(method(key, params)), jax.random.key(0), shapes
    )
    model = jp.lift(forward, materialize="error")

    def loss_fn(frozen, adapter, batch, key):
        logits = model(jp.combine(frozen, adapter), batch["tokens"])
        return cross_entropy(logits, batch["targets"])

    return *split, loss_fn


def lower(config, policy, chip):
    """The step, from shapes alone, for one chip or the CPU."""
    frozen, adapter, loss_fn = qlora(config)
    tx = POLICIES[policy]()
    if policy == "kernel":
        frozen = fused(frozen)
    state = placed(jax.eval_shape(functools.partial(init, tx=tx), adapter), chip)
    if policy == "paged":
        state = state._replace(opt_state=to_host(state.opt_state))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    batch = placed({"tokens": tokens, "targets": tokens}, chip)
    step = jax.jit(train_step(loss_fn, tx, max_grad_norm=0.3), donate_argnums=0)
    traced = step.trace(state, placed(frozen, chip), batch, None)
    return traced.lower(lowering_platforms=("cpu" if chip == "cpu" else "tpu",)), on_host(state)


def on_host(state):
    """Bytes of the arrays that lie in host memory, by their shapes."""
    leaves = [x for x in jax.tree.leaves(state) if x.sharding.memory_kind == "pinned_host"]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


@functools.cache
def place(chip):
    """The first chip of a topology, or the CPU. Cached: each topology has devices of its own."""
    topology = TOPOLOGIES[chip]
    devices = (
        topologies.get_topology_desc(topology, platform="tpu").devices
        if topology
        else jax.devices("cpu")
    )
    return NamedSharding(Mesh(np.array(devices[:1]), ("chip",)), P())


def placed(tree, chip):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(chip)), tree
    )


def step_bytes(config, policy, chip):
    """Bytes of the compiled step by kind; on a chip that it does not fit, what XLA says."""
    begin = time.perf_counter()
    lowered, host_state = lower(config, policy, chip)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error).splitlines()[0]}
    memory = program.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    return {
        "bytes": sum(parts.values()) - 2 * parts["aliased"],
        **parts,
        "host_state": host_state,
        "host_arguments": memory.host_argument_size_in_bytes,
        "host_temporaries": memory.host_temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


def train_gib(sizes=tuple(CONFIGS), policies=MOMENTS, chips=("v5p", "cpu")):
    """GiB of a step by size and policy, see `summary`. What has been compiled before is kept."""
    asked = list(itertools.product(sizes, policies, chips))
    for size, policy, chip in asked:
        if (size, policy, chip) not in known_rows():
            row = {"size": size, "policy": policy, "chip": chip}
            row |= step_bytes(checked(size), policy, chip)
            print(json.dumps(row), flush=True)
            keep(known_rows() | {(size, policy, chip): row})
    return summary([row for key, row in known_rows().items() if key in asked])


def checked(size):
    config = CONFIGS[size]
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(decoder.shapes(config)))
    assert parameters == PARAMETERS[size], (size, parameters)
    return config


def kernel_bytes(tokens, rows, columns, dtype, chip):
    """The kernel compiled for a product and its backward pass."""

    def both(w, x, y):
        value, back = jax.vjp(lambda x: nf4_matmul.product(x, w, dtype=dtype), x)
        return value, *back(y)

    w = jax.eval_shape(
        lambda w: fused_weight(nf4(w, double=True)), jax.ShapeDtypeStruct((rows, columns), dtype)
    )
    x, y = (jax.ShapeDtypeStruct((tokens, n), dtype) for n in (rows, columns))
    traced = jax.jit(both).trace(*placed((w, x, y), chip))
    program = traced.lower(lowering_platforms=("tpu",)).compile()
    return {
        "tokens": tokens,
        "in": rows,
        "out": columns,
        "dtype": jnp.dtype(dtype).name,
        "chip": chip,
        "mosaic_calls": program.as_text().count('custom_call_target="tpu_custom_call"'),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "decoded": rows * columns * jnp.dtype(dtype).itemsize,
    }


def fused_weight(w):
    return dataclasses.replace(w, kernel="pallas")


def compile_kernel():
    rows = [kernel_bytes(*p, chip) for chip, p in itertools.product(("v5e", "v5p"), PRODUCTS)]
    RESULTS.with_suffix(".kernel.json").write_text(json.dumps(rows, indent=1) + "\n")
    return {"kernel": rows}


def known_rows():
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {(row["size"], row["policy"], row["chip"]): row for row in rows}


def keep(rows):
    order = itertools.product(CONFIGS, POLICIES, TOPOLOGIES)
    listed = [rows[key] for key in order if key in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(listed, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(report(listed))
    stamp("quantization_tpu")


def summary(rows):
    """`{quantity: {size: {policy: GiB}}}`: of the TPU, of v5e, of the CPU, of the TPU's host.

    `None` stands for a step that does not fit the chip.
    """
    out = {"train_gib": {}, "train_gib_v5e": {}, "train_gib_cpu": {}, "host_gib": {}}
    for row in rows:
        name = {"v5p": "train_gib", "v5e": "train_gib_v5e", "cpu": "train_gib_cpu"}[row["chip"]]
        of_size = out[name].setdefault(row["size"], {})
        of_size[row["policy"]] = gib(row["bytes"]) if "bytes" in row else None
        if row["chip"] == "v5p":
            out["host_gib"].setdefault(row["size"], {})[row["policy"]] = gib(row["host_state"])
    return out


def gib(count):
    return round(count / GIB, 3)


def report(rows):
    lines = [
        "# One QLoRA step, compiled for a TPU without one",
        "",
        f"`benchmarks/quantization_tpu.py`: jax {jax.__version__}, libtpu 0.0.42.1. Llama shapes, "
        f"NF4 with double quantization, LoRA of rank {RANK} on all hidden matrices, adapter and "
        f"gradients in bfloat16, AdamW, 1 x {LENGTH} tokens, remat, layers in one scan. GiB are "
        "2^30 bytes: arguments + temporaries + outputs - aliased.",
        "",
        "| size | moments | chip | GiB in all | arguments | temporaries | on the host |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        begin = f"| {row['size']} | {row['policy']} | {row['chip']} |"
        if "refused" in row:
            lines.append(f"{begin} does not fit | | | |")
            continue
        columns = [row[key] for key in ("bytes", "arguments", "temporaries", "host_state")]
        lines.append(f"{begin} " + " | ".join(f"{gib(n):.2f}" for n in columns) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=MOMENTS)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=["v5p", "cpu"])
    parser.add_argument("--again", action="store_true", help="compile what is known, too")
    parser.add_argument("--kernel", action="store_true", help="the kernel alone, for TPUs")
    args = parser.parse_args()
    if args.kernel:
        return print(json.dumps(compile_kernel()))
    if args.again:
        asked = set(itertools.product(args.sizes, args.policies, args.chips))
        keep({key: row for key, row in known_rows().items() if key not in asked})
    print(json.dumps(train_gib(args.sizes, args.policies, args.chips)))


if __name__ == "__main__":
    main()
