"""How much memory `decoder.load` takes: its peak above an idle process, over the model's size.

    python benchmarks/loading.py --json

Makes a random folder of the 1.1B Llama shape (TinyLlama) in bfloat16, in 4 files, 2.2 GB in a
temporary folder. Loads it in fresh processes, once as it is, once in float32 and once into NF4
with double quantization, beside one that does all but the loading. The peak is that of the
resident set, which counts pages of mapped files too: VmHWM of /proc/self/status (Linux only),
since `ru_maxrss` would start from the parent's. The last line is JSON; the exit status is 1 if a
dense model takes more than 1.1 times its size, or the quantized one more than its size, twice
the largest tensor of the file and 100 MB. About two minutes on 2 cores.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models import decoder

CONFIGS = {
    "1.1B": decoder.Config(
        vocab=32000, width=2048, mlp_width=5632, layers=22, heads=32, kv_heads=4, head_dim=64
    ),
    "tiny": decoder.Config(
        vocab=512, width=64, mlp_width=172, layers=5, heads=8, kv_heads=4, head_dim=8
    ),
}
FILES = 4
LIMIT = 1.1
SPARE = 100_000_000
FORMAT = "nf4+dq"


def make(config: decoder.Config, folder: str) -> None:
    """Writes random weights tensor by tensor, without holding the model."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(jnp.bfloat16)

    def random(shape):
        return safetensors.Lazy(
            shape, dtype, lambda: rng.standard_normal(shape, np.float32).astype(dtype)
        )

    tensors = {}
    for stack in decoder.plan(config).values():
        for name in stack.names:
            tensors[name] = random(stack.tensor_shape)
    size = size_of(config, dtype)
    safetensors.write_folder(
        folder, config.to_hf(), tensors, shard_bytes=size // FILES + size // 50
    )


def size_of(config: decoder.Config, dtype) -> int:
    """Bytes of the parameters."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder.shapes(config, dtype))
    )


def largest_of(config: decoder.Config) -> int:
    """Bytes of the largest tensor of the file."""
    return max(2 * math.prod(stack.tensor_shape) for stack in decoder.plan(config).values())


def load(folder: str, dtype: str | None, quantize: str | None, idle: bool) -> None:
    """The fresh process: prints its peak and the model in bytes, and the seconds of loading."""
    jnp.zeros(1).block_until_ready()  # The backend stands in the idle process too.
    start, params = time.perf_counter(), None
    if not idle:
        _, params = decoder.load(folder, dtype=dtype and jnp.dtype(dtype), quantize=quantize)
        jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"peak": peak, "seconds": seconds, "size": size}))


def fresh(folder: str, *options: str) -> dict:
    """The same script in a new process, which only loads."""
    command = [sys.executable, __file__, "--folder", folder, *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--shape", choices=CONFIGS, default="1.1B")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--quantize", help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        load(options.folder, options.dtype, options.quantize, options.idle)
        return 0
    config = CONFIGS[options.shape]
    result = {"shape": options.shape, "files": FILES}
    with tempfile.TemporaryDirectory() as folder:
        make(config, folder)
        idle = fresh(folder, "--idle")["peak"]
        result["idle_bytes"] = idle
        for dtype in ("bfloat16", "float32"):
            size = size_of(config, dtype)
            got = fresh(folder, "--dtype", dtype)
            ratio = (got["peak"] - idle) / size
            result[dtype] = {
                "model_bytes": size,
                "peak_above_idle_bytes": got["peak"] - idle,
                "ratio": round(ratio, 4),
                "seconds": round(got["seconds"], 1),
            }
            if not options.json:
                print(f"{options.shape} as {dtype}: {size / 1e9:.2f} GB, {ratio:.3f} times at most")
        got = fresh(folder, "--quantize", FORMAT)
        above, allowed = got["peak"] - idle, got["size"] + 2 * largest_of(config) + SPARE
        result[FORMAT] = {
            "model_bytes": got["size"],
            "largest_tensor_bytes": largest_of(config),
            "peak_above_idle_bytes": above,
            "allowed_bytes": allowed,
            "seconds": round(got["seconds"], 1),
        }
        if not options.json:
            sizes = f"{got['size'] / 1e9:.2f} GB, {above / 1e9:.2f} of {allowed / 1e9:.2f} allowed"
            print(f"{options.shape} as {FORMAT}: {sizes}")
    print(json.dumps(result))
    dense = max(result[dtype]["ratio"] for dtype in ("bfloat16", "float32"))
    return int(dense > LIMIT or above > allowed)


if __name__ == "__main__":
    sys.exit(main())
