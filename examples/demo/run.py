"""The demo: teach a small model that has read Python's documentation to read Python's source.

    make demo                                                     # what ships here
    make demo ARGS="--quantize nf4"                               # QLoRA beside LoRA
    python examples/demo/run.py --model FOLDER --data FILE.jsonl  # your own
    make demo ARGS="--folder RUN"                                 # can be stopped and gone on with

A Llama of a million parameters (base/, made by pretrain.py) is fine-tuned on source code (data/)
by LoRA, in full, and by a probe (the final norm and an untied copy of the head), with equal tokens
and each at the rate that sweep.py found best. All are evaluated on modules of the standard library
that stand in no training text. The adapter is then written, read by a new process that has only
the two folders, and merged; the last line printed is JSON.

With --quantize, QLoRA runs beside LoRA on the same batches, over a base whose hidden matrices are
in that format, and both are evaluated on the way.

On a terminal a bar shows how far it is; where the output goes to a file, each evaluation writes a
line. With --folder, checkpoints are kept there, and the same command goes on where it was stopped.

With a model of your own (a Hugging Face folder of the Llama family) only LoRA runs, or only QLoRA,
unless --methods asks for more. Records are `messages`, `prompt` and `completion`, or `text`.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reload
from attention import blocked
from rich.console import Console
from rich.table import Table

import jaxpeft as jp
from jaxpeft._view import is_view
from jaxpeft.data import Batches, Examples, TextTokenizer, read_examples
from jaxpeft.io import save_adapter
from jaxpeft.models import decoder
from jaxpeft.quant import FORMATS
from jaxpeft.serve import generator
from jaxpeft.train import (
    Evaluation,
    UserError,
    cross_entropy,
    evaluate,
    fit,
    one_line_errors,
    read_metrics,
)

HERE = Path(__file__).parent
METHODS = ("lora", "full", "probe")
RANK = 16
ROWS = 4  # of a batch
STEPS = 300  # a little more than one pass over data/train.jsonl
WRITTEN = 80  # tokens of a sample, at most
KEY = jax.random.key(0)
PROMPT = "class Stack:\n\n    def __init__(self, items=None):\n"


class Model(NamedTuple):
    """A decoder that a method is put on."""

    config: decoder.Config
    params: dict[str, Any]
    forward: Callable[..., Any]
    sites: jp.Sites


class Tuned(NamedTuple):
    """What became of it."""

    model: Model
    method: Any
    frozen: Any
    adapter: dict[str, jax.Array]
    held_out: Evaluation
    course: dict[int, float]  # held-out loss by step, on the way
    seconds: float


def model_of(config: decoder.Config, params: dict[str, Any]) -> Model:
    few = config.layers <= 8  # a scan of a few layers is slower than the layers one by one
    forward = decoder.pure(config, attention_fn=blocked, unroll=config.layers if few else 1)
    sites = jp.sites(forward, params, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    return Model(config, params, forward, sites)


def untied(model: Model) -> Model:
    """The same model with a head of its own, which starts as a copy of the embedding."""
    if not model.config.tied:
        return model
    head = {"kernel": model.params["embed"]["embedding"].T}
    return model_of(dataclasses.replace(model.config, tied=False), {**model.params, "head": head})


def method_for(name: str, model: Model, rank: int, format: str | None) -> tuple[Model, Any]:
    """The method of a name, and the model that it goes on."""
    if name in ("lora", "qlora"):
        lora = jp.lora(rank, model.sites.linear, alpha=2 * rank)
        quantized = name == "qlora"
        return model, jp.chain(quantizer(model, format), lora) if quantized else lora
    if name == "full":
        return model, jp.full_finetuning(model.sites)
    model = untied(model)
    return model, jp.linear_probe(model.sites, "norm/scale", "head/kernel")


def quantizer(model: Model, format: str | None) -> Any:
    """Everything between the embedding and the head in fewer bits."""
    return jp.quantize(format, model.sites.hidden)


def loss_of(model: Model):
    """Sum of the losses of a batch's target tokens, and their weight."""
    lifted = jp.lift(model.forward, materialize="error")

    def loss(adapter, frozen, batch, key):
        del key  # no dropout
        logits = lifted(
            jp.combine(frozen, adapter), batch["tokens"], segment_ids=batch["segment_ids"]
        )
        return cross_entropy(logits, batch["targets"], batch["weights"])

    return loss


def measure(model: Model, adapter, frozen, examples: Examples) -> Evaluation:
    batches = Batches(examples, batch_size=16, shuffle=False, epochs=1)
    return evaluate(jax.jit(loss_of(model)), adapter, frozen, batches)


def tune(name, base: Model, train: Examples, held_out: Examples, options, folder=None) -> Tuned:
    """One method, some steps of AdamW with warmup and cosine decay, evaluated at each quarter.

    With a folder, checkpoints go there, and a run that was stopped goes on from them.
    """
    begin = time.perf_counter()
    model, method = method_for(name, base, options.rank, options.quantize)
    frozen, adapter = jp.split(method(KEY, model.params))
    rate, steps = options.rates[name], options.steps
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps, rate / 10)
    run = fit(
        loss_of(model),
        optax.adamw(schedule, b2=0.98, weight_decay=0.0),
        adapter,
        frozen,
        Batches(train, batch_size=ROWS),  # the same batches for every method
        steps=steps,
        clip=1.0,
        held_out=Batches(held_out, batch_size=16, shuffle=False, epochs=1),
        eval_every=max(1, steps // 4),
        folder=folder,
        save_every=None if folder is None else max(1, steps // 12),
        keep=1,
        progress=None if sys.stdout.isatty() else "lines",
    )
    if not run.finished:
        onward = "--folder to keep checkpoints" if folder is None else "the same command to go on"
        step = int(run.state.step)
        raise UserError(f"{name} was stopped at step {step} of {steps}. Use {onward}.")
    course = {}
    if folder is not None:
        records = read_metrics(folder / "metrics.jsonl")
        course = {r["step"]: r["held_out_loss"] for r in records if "held_out_loss" in r}
    seconds = time.perf_counter() - begin
    return Tuned(model, method, frozen, run.state.adapter, run.held_out, course, seconds)


def claim(folder: Path, options) -> None:
    """Writes down what is run in a folder, or refuses one in which something else was."""
    said = {"model": options.model, "data": options.data, "held_out": options.held_out}
    said = {name: value and str(Path(value).resolve()) for name, value in said.items()}
    for name in ("rank", "steps", "context", "quantize", "rates"):
        said[name] = getattr(options, name)
    note = folder / "run.json"
    if note.exists():
        before = json.loads(note.read_text())
        for name, value in said.items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder} holds a run with {name} {before.get(name)}, not {value}. Use the "
                    f"options that it was begun with, or another folder."
                )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(said, indent=1) + "\n")


def sample_prompt(examples: Examples, room: int) -> np.ndarray:
    """How the first example begins whose prompt leaves room for what is to be written.

    Its whole prompt, up to what the loss counts. A text has none: then its first 24 tokens.
    """
    prompts = []
    for index in range(len(examples)):
        ids, counted = examples[index]
        first = int(np.argmax(counted))
        prompts.append(ids[:first] if first else ids[: min(24, len(ids) - 1)])
        if len(prompts[-1]) <= room:
            return prompts[-1]
    return min(prompts, key=len)


def writer(tokenizer: TextTokenizer, model: Model, prompt: np.ndarray) -> Callable[[Any], str]:
    """What a tree of parameters writes behind the prompt."""
    # One function object for all trees, or the base would be compiled as another program.
    write = generator(
        jp.lift(model.forward),
        functools.partial(decoder.init_cache, model.config),
        max_new=min(WRITTEN, model.config.longest + 1 - len(prompt)),
        temperature=0.6,
        top_p=0.9,
        eos=sorted({*model.config.eos, *tokenizer.stop_ids}),
    )

    def text(tree: Any) -> str:
        out = write(tree, jnp.asarray(prompt)[None], key=KEY)
        ids = np.asarray(out.tokens[0, : int(out.lengths[0])])
        return tokenizer.tokenizer.decode(ids.tolist())

    return text


def reload_difference(folder: Path, adapter_folder: Path, tuned: Tuned) -> float:
    """The largest difference of a logit in a new process that is given only the two folders."""
    command = [sys.executable, str(HERE / "reload.py"), str(folder), str(adapter_folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    here = reload.logits(tuned.model.config, jp.combine(tuned.frozen, tuned.adapter))
    return float(np.max(np.abs(np.load(io.BytesIO(done.stdout)) - here)))


def merge_difference(tuned: Tuned, examples: Examples) -> float:
    """The largest difference of a logit between the merged and the lifted model."""
    batch = Batches(examples, batch_size=4, shuffle=False)[0]
    where = {"segment_ids": batch["segment_ids"]}
    tree = jp.combine(tuned.frozen, tuned.adapter)
    lifted = jax.jit(jp.lift(tuned.model.forward))(tree, batch["tokens"], **where)
    merged = jax.jit(tuned.model.forward)(jp.merge(tree), batch["tokens"], **where)
    # Places of padding see nothing and mean nothing.
    return float(jnp.max(jnp.abs(lifted - merged)[batch["segment_ids"] > 0]))


def read(options, tokenizer: TextTokenizer, context: int) -> tuple[Examples, Examples]:
    """Training and held-out examples; without a held-out file every tenth record."""
    train = read_examples(options.data, tokenizer, context=context)
    if options.held_out:
        return train, read_examples(options.held_out, tokenizer, context=context)
    if len(train) < 2:
        raise UserError(f"{options.data}: one record cannot be trained and evaluated on.")
    records = [train[i] for i in range(len(train))]
    held_out = records[9::10] or records[-1:]
    records = [record for i, record in enumerate(records) if i % 10 != 9][: len(train) - 1]
    return Examples(records, context=context), Examples(held_out, context=context)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of the Llama family")
    parser.add_argument("--data", type=Path, help=".jsonl or .csv to train on")
    parser.add_argument("--held-out", type=Path, help="as --data; default: every tenth record")
    parser.add_argument("--methods", default=None, help=f"of {','.join(METHODS)}")
    parser.add_argument("--quantize", choices=sorted(FORMATS), help="the base's format, for QLoRA")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--steps", type=int, help="default: ours 300, yours one pass")
    parser.add_argument("--rate", type=float, help="of LoRA; default: ours as swept, yours 2e-4")
    parser.add_argument("--context", type=int, default=256, help="tokens of a row")
    parser.add_argument("--prompt", help="of the samples; default: how a held-out text begins")
    parser.add_argument("--out", type=Path, help="where the adapter folder is left")
    parser.add_argument("--merged", type=Path, help="where the merged model is left, a --model")
    parser.add_argument("--folder", type=Path, help="for checkpoints, to go on where it stopped")
    options = parser.parse_args(argv)
    own = options.model is not None or options.data is not None
    if own and options.data is None:
        raise UserError("--model needs --data, a .jsonl or .csv file to train on.")
    if not own:
        options.data = HERE / "data" / "train.jsonl"
        options.held_out = options.held_out or HERE / "data" / "heldout.jsonl"
        options.steps = options.steps or STEPS
        options.prompt = options.prompt or PROMPT
    known = (*METHODS, "qlora") if options.quantize else METHODS
    default = METHODS if not (own or options.quantize) else ("lora",) * (not own)
    default = (*default, "qlora") if options.quantize else default or ("lora",)
    options.methods = options.methods.split(",") if options.methods else list(default)
    if unknown := [name for name in options.methods if name not in known]:
        raise UserError(f"--methods: {unknown} are none of {','.join(known)}.")
    # Whose adapter is written, read back, merged, and writes the text.
    options.main = "qlora" if options.quantize else "lora"
    if options.main not in options.methods:
        raise UserError(f"--methods needs {options.main}, whose adapter is written and read back.")
    swept = json.loads((HERE / "rates.json").read_text())
    options.rates = {name: swept[name]["rate"] for name in METHODS}
    if options.model is not None:
        options.rates = {"lora": 2e-4, "full": 2e-5, "probe": 2e-4}
    if options.rate is not None:
        options.rates["lora"] = options.rate
    options.rates["qlora"] = options.rates["lora"]
    options.model = options.model or HERE / "base"
    return options


def in_few_bits(console: Console, model: Model, held_out: Examples, options) -> dict[str, Any]:
    """What quantization alone does to the base: numbers, bits and loss."""
    tree = quantizer(model, options.quantize)(KEY, model.params)
    loss = measure(model, {}, tree, held_out).loss
    table = sum(math.prod(site.shape) for site in model.sites.embedding.values())
    others = sum(x.size for x in jax.tree.leaves(model.params)) - table
    chosen = sum(math.prod(site.shape) for site in model.sites.hidden.values())
    views = [x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x)]
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(views)) / chosen
    console.print(
        f"in {options.quantize}: {chosen:,} of {others:,} parameters that are no embedding "
        f"({chosen / others:.2%}), {bits:.3f} bits each; held-out loss {loss:.4f}"
    )
    return {
        "format": options.quantize,
        "parameters": chosen,
        "share": chosen / others,
        "bits": bits,
        "base_loss": loss,
    }


def compare(console: Console, tuned: dict[str, Tuned], quantized: dict[str, Any]) -> None:
    """LoRA and QLoRA at every evaluation."""
    if not {"lora", "qlora"} <= set(tuned):
        return
    table = Table(
        title=f"Held-out loss on the way, over the base and over its {quantized['format']}"
    )
    for column in ("step", "LoRA", "QLoRA", "difference"):
        table.add_column(column, justify="right")
    for step, ours in tuned["lora"].course.items():
        theirs = tuned["qlora"].course[step]
        table.add_row(str(step), f"{ours:.4f}", f"{theirs:.4f}", f"{theirs / ours - 1:+.2%}")
    console.print(table)


def report(console: Console, base: Evaluation, tuned: dict[str, Tuned], options) -> None:
    table = Table(title="Held-out loss in nats per token, after equal tokens")
    for column in ("", "loss", "perplexity", "trained numbers", "rate", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("base", f"{base.loss:.4f}", f"{base.perplexity:.2f}", "0", "", "")
    for name, t in tuned.items():
        size = sum(x.size for x in t.adapter.values())
        table.add_row(
            {"lora": "LoRA", "qlora": "QLoRA"}[name] + f", rank {options.rank}"
            if name in ("lora", "qlora")
            else name,
            f"{t.held_out.loss:.4f}",
            f"{t.held_out.perplexity:.2f}",
            f"{size:,}",
            f"{options.rates[name]:.0e}",
            f"{t.seconds:.0f}",
        )
    console.print(table)


def main(argv=None) -> dict[str, Any]:
    begin = time.perf_counter()
    options = arguments(argv)
    console = Console()
    try:
        model = model_of(*decoder.load(options.model, jnp.float32))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    tokenizer = TextTokenizer(options.model)
    context = min(options.context, model.config.context)
    train, held_out = read(options, tokenizer, context)
    options.steps = options.steps or len(Batches(train, batch_size=ROWS, epochs=1))
    console.print(
        f"{options.data.name}: {len(train):,} records, {train.targets:,} tokens; "
        f"held out: {len(held_out):,} records, {held_out.targets:,} tokens\n"
        f"{options.steps} steps of {ROWS} x {context} tokens for each method"
    )
    if options.folder is not None:
        claim(options.folder, options)
    if options.prompt is None:
        prompt = sample_prompt(held_out, model.config.longest + 1 - WRITTEN)
    else:
        prompt = np.asarray(tokenizer.tokenizer.encode(options.prompt).ids, np.int32)
    if len(prompt) > model.config.longest:
        raise UserError(
            f"--prompt has {len(prompt)} tokens, the model's context {model.config.longest}."
        )

    base = measure(model, {}, model.params, held_out)
    console.print(f"base: held-out loss {base.loss:.4f}")
    quantized = in_few_bits(console, model, held_out, options) if options.quantize else None
    tuned = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.methods:
            # The two that are compared step by step leave a record of their way.
            way = Path(scratch) / name if options.quantize and name in ("lora", "qlora") else None
            way = way if options.folder is None else options.folder / name
            console.print(f"{name}:")
            tuned[name] = tune(name, model, train, held_out, options, way)
            console.print(f"{name}: held-out loss {tuned[name].held_out.loss:.4f}")
        main = tuned[options.main]
        folder = options.out or (options.folder or Path(scratch)) / "adapter"
        save_adapter(folder, main.adapter, main.method, model.params, key=KEY)
        adapter_bytes = sum(file.stat().st_size for file in folder.glob("adapter-*.safetensors"))
        reload_diff = reload_difference(options.model, folder, main)
    merge_diff = merge_difference(main, held_out)
    if options.merged is not None:
        merged = jp.merge(jp.combine(main.frozen, main.adapter))
        decoder.save(options.merged, model.config, merged, tokenizer_from=options.model)

    write = writer(tokenizer, model, prompt)
    console.rule("a text begins")
    console.print(tokenizer.tokenizer.decode(prompt.tolist()), markup=False, highlight=False)
    label = {"lora": "LoRA", "qlora": "QLoRA"}[options.main]
    trees = {"base": model.params, label: jp.combine(main.frozen, main.adapter)}
    for name, tree in trees.items():
        console.rule(f"{name} goes on")
        console.print(write(tree), markup=False, highlight=False)
    console.rule()
    report(console, base, tuned, options)

    loss = {"base": base.loss, **{name: t.held_out.loss for name, t in tuned.items()}}
    recovered = None
    if "full" in loss and "lora" in loss:
        recovered = (loss["base"] - loss["lora"]) / (loss["base"] - loss["full"])
        console.print(f"LoRA recovers {recovered:.0%} of what full fine-tuning gains.")
    result = {
        "loss": {name: loss.get(name, math.nan) for name in ("base", *METHODS)},
        "recovered": recovered,
        "trainable": sum(x.size for x in main.adapter.values()),
        "adapter_bytes": adapter_bytes,
        "seconds": round(time.perf_counter() - begin, 1),
        "reload_diff": reload_diff,
        "merge_max_diff": merge_diff,
    }
    if quantized is not None:
        result["loss"]["qlora"] = loss["qlora"]
        result["quantized"] = quantized | {
            "course": {n: t.course for n, t in tuned.items() if t.course}
        }
        compare(console, tuned, quantized)
    result["loss"] = {k: None if math.isnan(v) else round(v, 4) for k, v in result["loss"].items()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with one_line_errors():
        main()
