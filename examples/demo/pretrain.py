"""Pretrains the demo's base: python examples/demo/pretrain.py

Builds the English corpus from the standard library of this Python (corpus.py), trains a byte-level
BPE tokenizer on it and on code, and trains a Llama of a million parameters on the English with
the project's own decoder and step. Writes examples/demo/base/, a Hugging Face folder of at most
6 MB, with what was measured in PRETRAINING.json beside it.

35 minutes on two cores that were shared with other work. Held-out loss: 3.466 nats per token on
English, 4.598 on code, which is what the demo then teaches it.
The same seed on the same Python gives the same held-out loss to 1 %.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
from attention import blocked
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from jaxpeft.models import decoder
from jaxpeft.train import cross_entropy, init, train_step

BASE = Path(__file__).parent / "base"
END = "<|endoftext|>"  # between documents; the end of a text in the demo, too

CONTEXT = 256
CONFIG = decoder.Config(
    vocab=2048,
    width=128,
    mlp_width=384,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    tied=True,  # a head of its own would be a quarter more parameters
    context=CONTEXT,
    eos=(0,),
)
# Of CONTEXT tokens each, per step. With so few tokens in all, many small steps learn more: after
# 0.3 million tokens the held-out loss of a twice as large model was 5.18 with 4 rows, 5.68 with 8.
ROWS = 4
SEED = 0


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE, which gives back any text exactly; on English and on code alike.

    With English alone a line of code would be twice as many tokens, and with code alone the
    base would meet most tokens for the first time in the demo.
    """
    programs = [corpus.strip(source) for _, source in corpus.sources(corpus.ADAPTATION)]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents + programs, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "bos_token": None,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,  # it would change the text that comes back
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def rows(documents: list[list[int]]) -> np.ndarray:
    """Documents, each behind an END, as rows of CONTEXT + 1 tokens; what is left over is dropped.

    Each row begins with the last token of the row before, so that every token is predicted once.
    """
    stream = np.concatenate([[0, *ids] for ids in documents]).astype(np.int32)
    count = (len(stream) - 1) // CONTEXT
    index = np.arange(count)[:, None] * CONTEXT + np.arange(CONTEXT + 1)
    return stream[index]


def batches(documents: list[list[int]], seed: int) -> Iterator[np.ndarray]:
    """(ROWS, CONTEXT + 1) for ever, the documents in another order in each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        epoch = rows([documents[i] for i in rng.permutation(len(documents))])
        order = rng.permutation(len(epoch))
        for start in range(0, len(order) - ROWS + 1, ROWS):
            yield epoch[order[start : start + ROWS]]


def language_loss(forward):
    """Sum of the losses of all tokens of a batch but the first, and their number."""

    def loss(params, frozen, batch, key):
        del frozen, key  # all is trained, nothing is random
        return cross_entropy(forward(params, batch[:, :-1]), batch[:, 1:])

    return loss


def mean_loss(forward, params, documents: list[list[int]]) -> float:
    """Nats per token over the documents."""
    loss = jax.jit(language_loss(forward))
    data = rows(documents)
    sums = [
        loss(params, None, jnp.asarray(data[i : i + ROWS]), None) for i in range(0, len(data), ROWS)
    ]
    total, count = np.sum(np.asarray(sums), axis=0)
    return float(total / count)


def pretrain(documents: list[list[int]], steps: int, rate: float, seed: int) -> tuple[dict, list]:
    """The parameters after `steps` steps of AdamW, and what was seen on the way."""
    forward = decoder.pure(CONFIG, unroll=CONFIG.layers, attention_fn=blocked)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 20)
    # Kernels decay, norms and the table do not: a token that is not in the batch gets no gradient.
    params = decoder.init(CONFIG, jax.random.key(seed))
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    tx = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.1, mask=mask)
    step = jax.jit(train_step(language_loss(forward), tx, clip=1.0), donate_argnums=0)

    state, seen, begin = init(params, tx), [], time.perf_counter()
    losses = []
    for i, batch in zip(range(1, steps + 1), batches(documents, seed), strict=False):
        state, metrics = step(state, None, jnp.asarray(batch), None)
        losses.append(metrics.loss)
        if i % 200 == 0 or i == steps:
            seconds = time.perf_counter() - begin
            loss = float(np.mean(jax.device_get(losses)))
            losses = []
            seen.append({"step": i, "loss": loss, "rate": float(schedule(i - 1))})
            print(
                f"step {i}/{steps}  loss {loss:.3f}  rate {seen[-1]['rate']:.1e}  "
                f"{i * ROWS * CONTEXT / seconds:,.0f} tokens/s  "
                f"{(steps - i) * seconds / i / 60:.1f} minutes left",
                flush=True,
            )
    return state.adapter, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    begin = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)

    english = corpus.documentation()
    tokenizer = train_tokenizer(english)
    save_tokenizer(tokenizer, options.out)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    documents = encode(english)
    tokens = sum(map(len, documents))
    size = sum(x.size for x in jax.tree.leaves(decoder.shapes(CONFIG)))
    print(f"{len(english)} documents, {tokens:,} tokens; {size:,} parameters", flush=True)

    params, seen = pretrain(documents, options.steps, options.rate, options.seed)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    decoder.save(options.out, CONFIG, half)

    # What ships is rounded to bfloat16, so that is what is measured, in the demo's float32.
    config, params = decoder.load(options.out, dtype=jnp.float32)
    forward = decoder.pure(config, unroll=config.layers, attention_fn=blocked)
    texts = {
        "documentation": corpus.held_out_documentation(),
        "code": [record["text"] for record in corpus.code(corpus.HELD_OUT)],
    }
    report = {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "parameters": size,
        "documents": len(english),
        "corpus_tokens": tokens,
        "trained_tokens": options.steps * ROWS * CONTEXT,
        "seed": options.seed,
        "rate": options.rate,
        "held_out_loss": {k: mean_loss(forward, params, encode(v)) for k, v in texts.items()},
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "curve": seen,
    }
    (options.out / "PRETRAINING.json").write_text(json.dumps(report, indent=1) + "\n")
    for kind, loss in report["held_out_loss"].items():
        print(f"held-out {kind}: {loss:.4f} nats per token, perplexity {np.exp(loss):.1f}")
    print(f"{report['minutes']} minutes")


if __name__ == "__main__":
    main()
