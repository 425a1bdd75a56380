"""What LoRA steps need on TPUs, compiled without one: make tpu-check

libtpu compiles for a TPU that is not there. For each step: bytes per chip (arguments, temporaries
and outputs, less what outputs share with donated arguments) and the collectives of the compiled
program by kind; those inside the scan over layers are counted once and run once a layer.

The steps are those of examples/tpu_lora.py (base in bfloat16 and cut over all chips, LoRA of rank
16 on all linears, every layer computed again in the backward pass, one row of 2048 tokens per chip)
and of the other examples. Printed and kept in benchmarks/results/tpu_check.json and .md. About 2
minutes of one core for each; `--only 8b` compiles what has that in its name.
"""

import argparse
import collections
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measured import stamp

import jaxpeft as jp
from jaxpeft.models import decoder
from jaxpeft.train import init

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "tpu_check.json"
sys.path.insert(0, str(HERE.parent / "examples"))
import existing_linen_loop  # noqa: E402
import existing_nnx_loop  # noqa: E402
import pmap_loop  # noqa: E402
import tpu_lora  # noqa: E402

RANK, LENGTH = 16, 2048


class Chip(NamedTuple):
    topology: str
    memory: float  # bytes


V5E, V5P = 16e9, 95e9
SLICES = {
    "1b": [Chip("v5e:2x2", V5E), Chip("v5p:2x2x1", V5P)],
    "8b": [Chip("v5e:4x4", V5E), Chip("v5p:2x2x1", V5P)],
    "70b": [Chip("v5e:8x16", V5E), Chip("v5p:2x2x4", V5P)],
}


def mesh_of(topology):
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return Mesh(np.array(devices), ("chips",), axis_types=(AxisType.Auto,))


def placed(tree, sharding):
    """Shapes that lie somewhere; `sharding` for all leaves, or a tree of them."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )


def split_shapes(method, params):
    """`jp.split(method(key, params))` of shapes; the frozen ones stay where they lie."""
    kept = {}

    def make(key):
        kept["frozen"], adapter = jp.split(method(key, params))
        return adapter

    adapter = jax.eval_shape(make, jax.random.key(0))
    return kept["frozen"], adapter


def lora_step(config, mesh):
    """The step of examples/tpu_lora.py, lowered."""
    everywhere, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("chips"))
    method, tx, step = tpu_lora.recipe(config, mesh, RANK, 1e-4)
    shapes = decoder.shapes(config, jnp.bfloat16)
    frozen, adapter = split_shapes(method, placed(shapes, tpu_lora.spread(shapes, mesh)))
    state = placed(jax.eval_shape(lambda a: init(a, tx), adapter), everywhere)
    batch = placed(tpu_lora.random_batch(config, mesh.size, LENGTH, 0), by_rows)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    step = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    return step.trace(state, frozen, batch, key).lower(lowering_platforms=("tpu",))


class Reached(Exception):
    """An example has come to its first step; the arguments are those of the step."""


def stop(*args):
    raise Reached(*args)


def first_step(example):
    """What an example passes to its first step, as shapes."""
    step, example.train_step = example.train_step, stop
    try:
        example.main(steps=1)
    except Reached as reached:
        return step, reached.args
    finally:
        example.train_step = step


def linen_step(mesh):
    step, args = first_step(existing_linen_loop)
    args = placed(jax.eval_shape(lambda: args), NamedSharding(mesh, P()))
    return step.trace(*args).lower(lowering_platforms=("tpu",))


def nnx_step(mesh):
    step, (model, optimizer, *batch) = first_step(existing_nnx_loop)
    graph, state = nnx.split((model, optimizer))

    def pure(state, *batch):
        model, optimizer = nnx.merge(graph, state)
        loss = step(model, optimizer, *batch)
        return nnx.state((model, optimizer)), loss

    args = placed(jax.eval_shape(lambda: (state, *batch)), NamedSharding(mesh, P()))
    return jax.jit(pure, donate_argnums=0).trace(*args).lower(lowering_platforms=("tpu",))


def pmap_step(mesh):
    devices, given = list(mesh.devices.flat), {}

    def recorded(step, **options):
        given["step"] = pmap(step, devices=devices, **options)
        return stop

    pmap, jax.pmap = jax.pmap, recorded
    try:
        pmap_loop.main(steps=1, devices=len(devices))
    except Reached as reached:
        args = reached.args
        return given["step"].lower(*jax.eval_shape(lambda: args))
    finally:
        jax.pmap = pmap


def compiled(lowered):
    """Figures of the program that libtpu makes of it."""
    begin = time.perf_counter()
    program = lowered.compile()
    memory = program.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return {
        "bytes_per_chip": total,
        **parts,
        "collectives": collectives(program.as_text()),
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


def collectives(program):
    """How many of each kind. XLA writes an overlapped one in several places, with one channel."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" ({kinds})(?:-start)?\(.*?channel_id=(\d+)", program)
    return dict(sorted(collections.Counter(kind for kind, _ in set(found)).items()))


def report(rows):
    lines = [
        "# LoRA steps on TPUs, compiled without one",
        "",
        f"`make tpu-check`: jax {jax.__version__}, libtpu 0.0.42.1. LoRA of rank {RANK} on all "
        f"linears, base in bfloat16 cut over all chips, remat, one row of {LENGTH} tokens per "
        "chip. GB are 10^9 bytes per chip. A collective inside the scan over layers counts once.",
        "",
        "| step | chips | GB in all | of | arguments | temporaries | collectives |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        kinds = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "none"
        gb = [f"{row[name] / 1e9:.3g}" for name in ("bytes_per_chip", "arguments", "temporaries")]
        lines.append(
            f"| {row['step']} | {row['topology']} ({row['chips']}) | {gb[0]} | "
            f"{row['memory'] / 1e9:.0f} | {gb[1]} | {gb[2]} | {kinds} |"
        )
    return "\n".join(lines) + "\n"


def cases():
    for name, slices in SLICES.items():
        for chip in slices:
            config, mesh = tpu_lora.SHAPES[name], mesh_of(chip.topology)
            yield f"tpu_lora {name}", chip, mesh.size, lambda c=config, m=mesh: lora_step(c, m)
    # Loops for one device, and pmap on four.
    for name, step, chips in (
        ("existing_linen_loop", linen_step, 1),
        ("existing_nnx_loop", nnx_step, 1),
        ("pmap_loop", pmap_step, 4),
    ):
        for topology, memory in ("v5e:2x2", V5E), ("v5p:2x2x1", V5P):
            devices = mesh_of(topology).devices[:chips]
            mesh = Mesh(devices, ("chips",))
            yield name, Chip(topology, memory), chips, lambda s=step, m=mesh: s(m)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the name of a step or a topology")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = {(row["step"], row["topology"]): row for row in kept}
    every = list(cases())
    for step, chip, chips, lower in every:
        if args.only in f"{step} {chip.topology}":
            row = {"step": step, "topology": chip.topology, "chips": chips, "memory": chip.memory}
            rows[step, chip.topology] = row | compiled(lower())
            print(json.dumps(rows[step, chip.topology]), flush=True)
    order = [(step, chip.topology) for step, chip, _, _ in every]
    known = [rows[key] for key in order if key in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(report(known))
    stamp("tpu_check")
    print(report(known))


if __name__ == "__main__":
    main()
