"""Learning rates of the demo's methods: python examples/demo/sweep.py

Every method at every rate, with the demo's steps, evaluated on modules of the training text that
are left out of the training here; the held-out modules play no part. Writes rates.json, with all
losses; 12 minutes on two cores that were shared with other work.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import run

from jaxpeft.data import TextTokenizer, read_examples
from jaxpeft.models import decoder

VALIDATION = ("fileinput", "linecache", "poplib", "queue", "reprlib", "selectors", "zipapp")
GRID = {
    "lora": (3e-3, 6e-3, 1.2e-2),
    "full": (1e-3, 2e-3, 4e-3),
    "probe": (2e-3, 4e-3, 8e-3),
}


def main() -> None:
    base = run.HERE / "base"
    model, tokenizer = run.model_of(*decoder.load(base, jnp.float32)), TextTokenizer(base)
    lines = (run.HERE / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    left_out = [json.loads(line)["module"] in VALIDATION for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        parts = []
        for name, wanted in (("train", False), ("validation", True)):
            file = Path(scratch) / f"{name}.jsonl"
            chosen = [line for line, out in zip(lines, left_out, strict=True) if out == wanted]
            file.write_text("".join(chosen))
            parts.append(read_examples(file, tokenizer, context=256))

    found = json.loads((run.HERE / "rates.json").read_text()) if sys.argv[1:] else {}
    for name in sys.argv[1:] or GRID:
        losses = {}
        for rate in GRID[name]:
            options = SimpleNamespace(
                rates={name: rate}, steps=run.STEPS, rank=run.RANK, quantize=None
            )
            tuned = run.tune(name, model, *parts, options)
            losses[str(rate)] = round(tuned.held_out.loss, 4)
            print(f"{name} {rate:g}: {tuned.held_out.loss:.4f}, {tuned.seconds:.0f} s", flush=True)
        found[name] = {"rate": float(min(losses, key=losses.get)), "losses": losses}
        (run.HERE / "rates.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
