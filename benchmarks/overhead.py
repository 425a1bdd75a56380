"""What lifting costs over the same LoRA step written by hand: python benchmarks/overhead.py --json

Nothing runs: programs are compiled from shapes, for CPU, and asked for their FLOPs and bytes. The
model is a Llama in plain JAX with its layers unrolled (XLA counts the body of a loop once). Every
compilation has a process of its own, hand-written and lifted in turn so that both see the same
load. About 5 minutes on 2 idle cores, 2 with --quick; the last line is JSON, and a full run is kept
in benchmarks/results/overhead.json.

    flops_vs_hand, temp_bytes_vs_hand   lifted over hand-written, the worse of the two shapes
    compile_seconds_vs_hand             likewise: tracing, lowering and compiling, cold
    flops_hand, flops_closed_form       of the 135M shape: (4 N + 6 sum r (in + out)) B T
                                        + 12 L B T^2 d, with N the parameters
    flops_vs_full                       lifted LoRA over full fine-tuning, of the 135M shape
    materialized                        weight-sized results that the hand-written step lacks
    dora_flops_vs_lora                  lifted DoRA over lifted LoRA, of the 135M shape;
    dora_temp_bytes_vs_lora             likewise
    dora_materialized                   weight-sized results that lifted LoRA lacks, of both shapes
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before jax starts
    # The default scheduler trades memory for overlap: it would be measured instead.
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

import jaxpeft as jp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
RANK, SCALE = 8, 2.0
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    batch: int
    length: int
    dtype: str
    remat: bool


SHAPES = {
    "135M": Shape(30, 576, 9, 3, 1536, 49152, 4, 256, "float32", False),  # SmolLM-135M's
    "4x2048": Shape(4, 2048, 32, 8, 8192, 32768, 4, 256, "bfloat16", True),
}


# The model: B rows, T tokens, D width, N heads, K key-value heads, H size of a head -------------


def matmul(x, w):
    return x @ w


def lora_by_hand(x, w):
    """x @ w + s * (x @ a) @ b, the factors in float32."""
    w, a, b = w
    y = SCALE * (x.astype(a.dtype) @ a @ b)
    return (x @ w + y).astype(x.dtype)


def forward(params, tokens, shape, product=matmul):
    """Logits (B, T, V). A kernel meets its input in `product` and nowhere else."""
    head = shape.width // shape.heads
    angles = jnp.arange(tokens.shape[1])[:, None] * 10000.0 ** (-jnp.arange(0, 1, 2 / head))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # (T, 1, H/2)

    def norm(x, scale):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
        return (y * scale).astype(x.dtype)

    def turned(x):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    def layer(x, p):
        y = norm(x, p["attn_norm"])
        q = product(y, p["q"]).reshape(*y.shape[:2], shape.kv_heads, -1, head)  # (B, T, K, G, H)
        k = product(y, p["k"]).reshape(*y.shape[:2], shape.kv_heads, head)
        v = product(y, p["v"]).reshape(*y.shape[:2], shape.kv_heads, head)
        q = turned(q.reshape(*y.shape[:2], -1, head)).reshape(q.shape)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, turned(k)).astype(jnp.float32)
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores * head**-0.5, -1e30)).astype(x.dtype)
        y = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(x.shape)
        x = x + product(y, p["o"])
        y = norm(x, p["mlp_norm"])
        y = jax.nn.silu(product(y, p["gate"])) * product(y, p["up"])
        return x + product(y, p["down"])

    x = params["embed"][tokens]
    for p in params["layers"]:
        x = (jax.checkpoint(layer) if shape.remat else layer)(x, p)
    return norm(x, params["norm"]) @ params["embed"].T


def loss(logits, tokens):
    """Mean cross entropy of the next token."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def param_shapes(shape):
    d, kv = shape.width, shape.width // shape.heads * shape.kv_heads
    sides = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
    sides |= {"gate": (d, shape.mlp), "up": (d, shape.mlp), "down": (shape.mlp, d)}
    layer = {name: jax.ShapeDtypeStruct(s, shape.dtype) for name, s in sides.items()}
    layer |= {name: jax.ShapeDtypeStruct((d,), shape.dtype) for name in ("attn_norm", "mlp_norm")}
    return {
        "embed": jax.ShapeDtypeStruct((shape.vocab, d), shape.dtype),
        "layers": [dict(layer) for _ in range(shape.layers)],
        "norm": jax.ShapeDtypeStruct((d,), shape.dtype),
    }


# The steps: (gradient function of its first argument, its arguments as shapes) ------------------


def by_hand(shape):
    params = param_shapes(shape)
    # Named as the library names them: where several orders would do, XLA's CPU scheduler follows
    # that of the arguments, and with nested lists (layer 2 before layer 10) both programs of the
    # 135M shape would need 2.51 GB of temporaries in the place of 2.75.
    adapter = {}
    for i, p in enumerate(params["layers"]):
        for name in LINEARS:
            n, m = p[name].shape
            adapter[f"layers/{i}/{name}/a"] = jax.ShapeDtypeStruct((n, RANK), jnp.float32)
            adapter[f"layers/{i}/{name}/b"] = jax.ShapeDtypeStruct((RANK, m), jnp.float32)

    def objective(adapter, frozen, tokens):
        layers = []
        for i, p in enumerate(frozen["layers"]):
            factors = (
                (adapter[f"layers/{i}/{n}/a"], adapter[f"layers/{i}/{n}/b"]) for n in LINEARS
            )
            layers.append({**p, **{n: (p[n], *ab) for n, ab in zip(LINEARS, factors, strict=True)}})
        return loss(forward({**frozen, "layers": layers}, tokens, shape, lora_by_hand), tokens)

    return objective, adapter, params


def lifted(shape, report="error", method=jp.lora):
    params, tokens = param_shapes(shape), token_shapes(shape)

    def model(params, tokens):
        return forward(params, tokens, shape)

    sites = jp.sites(model, params, tokens)
    apply = method(RANK, sites.linear, alpha=SCALE * RANK)
    tree = jax.eval_shape(apply, jax.random.key(0), params)
    frozen, adapter = jp.split(tree)
    model = jp.lift(model, materialize=report)

    def objective(adapter, frozen, tokens):
        return loss(model(jp.combine(frozen, adapter), tokens), tokens)

    return objective, adapter, frozen


def lifted_dora(shape, report="error"):
    return lifted(shape, report, jp.dora)


def full(shape):
    def objective(params, nothing, tokens):
        return loss(forward(params, tokens, shape), tokens)

    return objective, param_shapes(shape), ()


KINDS = {"hand": by_hand, "lifted": lifted, "full": full, "dora": lifted_dora}


def token_shapes(shape):
    return jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)


def measure(shape, kind):
    """FLOPs and bytes of one AdamW step, and what it took to get there."""
    objective, trained, frozen = KINDS[kind](shape)
    tx = optax.adamw(1e-4)

    def step(trained, state, frozen, tokens):
        value, grads = jax.value_and_grad(objective)(trained, frozen, tokens)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    args = trained, jax.eval_shape(tx.init, trained), frozen, token_shapes(shape)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": time.perf_counter() - begin,
        "trace_seconds": middle - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
    }


def materialized(shape, kind="lifted", beyond="hand"):
    """Weight-sized results of value and gradient beyond those of another kind of step."""
    sys.path.insert(0, str(ROOT / "tests" / "conformance"))
    import walk

    counts = {w.size for w in jax.tree.leaves(param_shapes(shape)["layers"]) if w.ndim == 2}
    events, found = [], {}
    for name in (beyond, kind):
        more = () if name == "hand" else (events.append,)
        objective, trained, frozen = KINDS[name](shape, *more)
        program = jax.make_jaxpr(jax.value_and_grad(objective))
        found[name] = walk.weight_sized(program(trained, frozen, token_shapes(shape)), counts)
    return [str(x) for x in [*events, *walk.more_than(found[kind], found[beyond])]]


def closed_form(shape):
    """FLOPs of a LoRA step: (4 N + 6 sum r (in + out)) per token, and attention's products."""
    params = param_shapes(shape)
    numbers = sum(x.size for x in jax.tree.leaves(params))
    factors = sum(RANK * sum(p[name].shape) for p in params["layers"] for name in LINEARS)
    tokens = shape.batch * shape.length
    attention = 12 * shape.layers * tokens * shape.length * shape.width
    return (4 * numbers + 6 * factors) * tokens + attention


# -------------------------------------------------------------------------------------------------


def in_a_process(name, kind):
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, kind], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name, runs):
    """Hand-written and lifted, `runs` times in turn; medians."""
    rows = {"hand": [], "lifted": []}
    for _ in range(runs):
        for kind in rows:
            rows[kind].append(in_a_process(name, kind))
            print(name, kind, rows[kind][-1], flush=True)
    one = {
        kind: {field: statistics.median(r[field] for r in many) for field in many[0]}
        for kind, many in rows.items()
    }
    ratios = {
        f"{field}_vs_hand": one["lifted"][field] / one["hand"][field] for field in one["hand"]
    }
    return {**one, **ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line is JSON (it always is)")
    parser.add_argument("--quick", action="store_true", help="one process of each kind, not three")
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, kind = args.one
        shape = SHAPES[name]
        measured = measure(shape, kind) if kind in KINDS else materialized(shape, *kind.split("/"))
        print(json.dumps(measured))
        return

    names = [args.shape] if args.shape else list(SHAPES)
    by_shape = {name: compare(name, 1 if args.quick else 3) for name in names}

    def worst(field):
        return max(one[field] for one in by_shape.values())

    out = {
        "flops_vs_hand": worst("flops_vs_hand"),
        "temp_bytes_vs_hand": worst("temp_bytes_vs_hand"),
        "compile_seconds_vs_hand": worst("seconds_vs_hand"),
        "materialized": [x for name in names for x in in_a_process(name, "lifted/hand")],
        "dora_materialized": [x for name in names for x in in_a_process(name, "dora/lifted")],
    }
    if "135M" in names:
        one = by_shape["135M"]
        out["flops_hand"] = one["hand"]["flops"]
        out["flops_closed_form"] = closed_form(SHAPES["135M"])
        out["flops_vs_full"] = one["lifted"]["flops"] / in_a_process("135M", "full")["flops"]
        dora = in_a_process("135M", "dora")
        for field in ("flops", "temp_bytes"):
            out[f"dora_{field}_vs_lora"] = dora[field] / one["lifted"][field]
    out["by_shape"] = by_shape
    if not (args.quick or args.shape):
        RESULTS.write_text(json.dumps(out, indent=1) + "\n")
        # Here, since a test loads this file alone.
        from measured import stamp

        stamp("overhead")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
