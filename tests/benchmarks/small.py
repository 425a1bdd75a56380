"""A data folder like the real one, in small: models drawn at random and a handful of examples."""

import csv

import jax
import tokenizers

from jaxpeft.models import decoder, encoder

SENTENCES = [
    (("play", "some", "jazz"), ("O", "O", "B-genre")),
    (("book", "the", "blue", "spice"), ("O", "O", "B-name", "I-name")),
    (("rate", "this", "book", "five"), ("O", "O", "O", "B-rating")),
    (("play", "blue", "moon", "now"), ("O", "B-track", "I-track", "O")),
]
MEANINGS = [
    ("name[Blue Spice], eatType[pub]", ["Blue Spice is a pub.", "A pub: Blue Spice."]),
    ("name[Zizzi], near[The Mill], familyFriendly[yes]", ["Zizzi is for kids."]),
]


def write(folder):
    """Writes the folder."""
    texts = [" ".join(words) for words, _ in SENTENCES]
    for name, lines in (("train", texts * 3), ("test", [f"{text} ?" for text in texts[:2]])):
        kinds = ("NUM:count", "HUM:ind")
        lines = [f"{kinds[i % 2]} {line}" for i, line in enumerate(lines)]
        _write(folder / f"trec/TREC.{name}", "\n".join(lines))
        _table(
            folder / f"banking77/{name}.csv",
            "text,category",
            [x.split(" ", 1)[::-1] for x in lines],
        )
    for name, chosen in (("train", SENTENCES), ("valid", SENTENCES[:2]), ("test", SENTENCES[3:])):
        _write(folder / f"snips/{name}/seq.in", "\n".join(" ".join(w) for w, _ in chosen))
        _write(folder / f"snips/{name}/seq.out", "\n".join(" ".join(t) for _, t in chosen))
    for name in ("trainset", "devset", "testset_w_refs"):
        pairs = [(mr, f"{name[:2]} {ref}") for mr, refs in MEANINGS for ref in refs]
        _table(folder / f"e2e_nlg/{name}.csv", "mr,ref", pairs)
    _minilm(folder / "minilm-l6", texts)
    _stories(folder / "stories260k", [ref for _, refs in MEANINGS for ref in refs])


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _table(path, header, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *lines])


def _minilm(folder, texts):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = encoder.Config(
        tokenizer.get_vocab_size(), 16, 32, 2, 2, max_position_embeddings=80, pooler=True
    )
    encoder.save(folder, config, encoder.init(config, jax.random.key(0)))
    tokenizer.save(str(folder / "tokenizer.json"))


def _stories(folder, texts):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    config = decoder.Config(
        tokenizer.get_vocab_size(),
        16,
        32,
        2,
        2,
        1,
        16,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        eos_token_ids=(2,),
    )
    # Large enough that what a token is depends on all that came before.
    params = jax.tree.map(
        lambda x: 20 * x if x.ndim > 2 else x, decoder.init(config, jax.random.key(0))
    )
    decoder.save(folder, config, params)
    tokenizer.save(str(folder / "tokenizer.json"))
