"""LoRA on all chips of a TPU slice, the base sharded over them.

On every host of the slice:

    python examples/tpu_lora.py --distributed --model Llama-3-8B --data train.jsonl --out gs://...

The base lies in bfloat16, one part of every matrix on each chip, and is gathered layer by layer;
the adapter (float32) and its moments are small and lie on every chip; the batch is split by rows.
Killed and started again, it goes on from the last checkpoint in --out.

Llama 3 8B, rank 16 on all linears, 16 rows of 2048 tokens per step on 16 chips of v5e: 4.8 of 16 GB
per chip (compiled without a TPU, benchmarks/results/tpu_check.md has 1B to 70B). A step has 1.7
PFLOP, the layers being computed twice: 1.4 s at 40 % of the chips' 197 TFLOP/s each, 0.23 dollars
per million tokens at 1.20 dollars per chip and hour. These two are estimates, not measured.

Without --model the weights are random, of a shape named by --shape; without --data so are the
tokens. `--shape tiny` runs anywhere, also on
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft._weight import Weight
from jaxpeft.data import Batches, TextTokenizer, read_examples
from jaxpeft.extend import apply_to_sites, base_weight, dense, static, weight
from jaxpeft.models import decoder
from jaxpeft.train import cross_entropy, init, train_step

LLAMA3 = decoder.Rope(theta=500000.0)
LLAMA32 = decoder.Rope(theta=500000.0, kind="llama3", factor=32.0, low=1.0, high=4.0, context=8192)
SHAPES = {  # vocabulary, width, width of the MLP, layers, heads, key-value heads, size of a head
    "tiny": decoder.Config(256, 64, 128, 2, 4, 2, 16, tied=True),
    "1b": decoder.Config(128256, 2048, 8192, 16, 32, 8, 64, rope=LLAMA32, tied=True),
    "8b": decoder.Config(128256, 4096, 14336, 32, 32, 8, 128, rope=LLAMA3),
    "70b": decoder.Config(128256, 8192, 28672, 80, 64, 8, 128, rope=LLAMA3),
}


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face folder of the Llama family")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="random weights instead")
    parser.add_argument("--data", help="a .jsonl or .csv file; random tokens without it")
    parser.add_argument("--out", help="folder or bucket for checkpoints")
    parser.add_argument("--distributed", action="store_true", help="several hosts run this")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, help="of a batch; default one per chip")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    return parser.parse_args(argv)


def spread(params, mesh):
    """One part of every matrix on each chip, cut along its inputs; vectors on all."""

    def one(path, x):
        if path[-1].key not in ("kernel", "embedding") or x.shape[-2] % mesh.size:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*[None] * (len(x.shape) - 2), "chips", None))

    return jax.tree_util.tree_map_with_path(one, params)


@weight
class ByRows(Weight):
    """The matrix `w`, with inputs and outputs held to the chips that their rows are on.

    Left to itself XLA also moves rows to the parts of a kernel, which takes more memory the more
    chips there are: 70B would not fit into v5e. Like this it gathers the kernel of one layer.
    """

    w: Any = base_weight()
    mesh: Mesh = static()

    def forward(self, x):
        rows = NamedSharding(self.mesh, P("chips"))
        y = jax.lax.with_sharding_constraint(x, rows) @ self.w
        return jax.lax.with_sharding_constraint(y, rows)

    def materialize(self):
        return dense(self.w)


def by_rows(sites, mesh):
    """The method that puts `ByRows` around the selected kernels."""

    def make(key, site, view):
        return dataclasses.replace(view, weight=ByRows(view.weight, mesh))

    return lambda key, tree: apply_to_sites(key, tree, sites, make, caller="by_rows")


def recipe(config, mesh, rank, rate):
    """The method, the optimizer and the train step, from shapes alone."""
    forward = decoder.pure(config, remat="full")
    shapes = decoder.shapes(config, jnp.bfloat16)
    sites = jp.sites(forward, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = jp.chain(by_rows(sites.linear, mesh), jp.lora(rank, sites.linear, alpha=2 * rank))
    model = jp.lift(forward, materialize="error")

    def loss_fn(adapter, frozen, batch, key):
        tree = jp.combine(frozen, adapter)
        where = {name: batch[name] for name in ("segment_ids", "positions")}
        return cross_entropy(
            model(tree, batch["tokens"], **where), batch["targets"], batch["weights"]
        )

    tx = optax.adamw(rate, b2=0.99)
    return method, tx, train_step(loss_fn, tx, clip=1.0, compute_dtype=jnp.bfloat16)


def random_batch(config, rows, length, index):
    """Tokens of which each follows from the one before, so that there is something to learn."""
    first = np.random.default_rng(index).integers(0, config.vocab, (rows, 1))
    tokens = (first + 7 * np.arange(length + 1)) % config.vocab
    ones, tokens = np.ones((rows, length), np.int32), tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones.astype(np.float32)}
    return {**batch, "segment_ids": ones, "positions": positions}


def main(argv=None):
    args = arguments(argv)
    if args.distributed:
        jax.distributed.initialize()  # finds the other hosts of a TPU slice by itself
    mesh = jax.make_mesh((jax.device_count(),), ("chips",), axis_types=(AxisType.Auto,))
    everywhere, rows_apart = NamedSharding(mesh, P()), NamedSharding(mesh, P("chips"))
    host, hosts = jax.process_index(), jax.process_count()
    rows, key = args.rows or mesh.size, jax.random.key(0)

    # The base, each host reading or making its own parts of it.
    if args.model:
        hf = json.loads((Path(args.model) / "config.json").read_text())
        shardings = spread(decoder.shapes(decoder.Config.from_hf(hf)), mesh)
        config, params = decoder.load(args.model, jnp.bfloat16, shardings)
    else:
        config = SHAPES[args.shape]
        shardings = spread(decoder.shapes(config), mesh)
        make = jax.jit(lambda key: decoder.init(config, key, jnp.bfloat16), out_shardings=shardings)
        params = make(key)

    # The data: batch i is a function of i, so the step is the position in the data.
    if args.data:
        examples = read_examples(args.data, TextTokenizer(args.model), context=args.length)
        batches = Batches(examples, batch_size=rows, shard=(host, hosts)).__getitem__
    else:
        batches = lambda i: random_batch(config, rows // hosts, args.length, i * hosts + host)  # noqa: E731

    # The adapter and the step. The state is donated: its old buffers become the new ones. Said to
    # be everywhere, or XLA would choose another place for it and compile the second step anew.
    method, tx, step = recipe(config, mesh, args.rank, args.rate)
    frozen, adapter = jp.split(method(key, params))
    state = jax.device_put(init(adapter, tx), everywhere)
    step = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    if host == 0:
        print(jp.count_params(frozen, adapter), f"on {mesh.size} chips")

    # Where an earlier run has stopped.
    manager = None
    if args.out:
        options = ocp.CheckpointManagerOptions(save_interval_steps=args.save_every, max_to_keep=2)
        out = args.out if "://" in args.out else Path(args.out).absolute()
        manager = ocp.CheckpointManager(out, options=options)
        if (last := manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(last, args=ocp.args.StandardRestore(like))

    losses, begin = [], time.perf_counter()
    for i in range(int(state.step), args.steps):
        batch = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(rows_apart, x), batches(i)
        )
        state, metrics = step(state, frozen, batch, key)
        if i % 10 == 0 or i + 1 == args.steps:
            losses.append(float(metrics.loss))  # waits for the step, so not in every one
            seconds, begin = time.perf_counter() - begin, time.perf_counter()
            if host == 0:
                print(f"step {i:5d}  loss {losses[-1]:.4f}  {seconds:.1f} s since the last line")
        if manager:
            manager.save(i + 1, args=ocp.args.StandardSave(state), force=i + 1 == args.steps)
    if manager:
        manager.wait_until_finished()
    return losses, state


if __name__ == "__main__":
    main()
