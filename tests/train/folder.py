"""A model folder with a small tokenizer, as far as text needs it."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Question: what did the fox do?\n\n",
    "Answer: it jumped over the dog, and the dog did not mind. user assistant system\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make(folder, config=None, adds_bos=True):
    """Writes `tokenizer.json` and the configs into a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    trim = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        begin = [("<s>", tokenizer.token_to_id("<s>"))]
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
        tokenizer.post_processor = processors.Sequence([trim, template])
    else:
        tokenizer.post_processor = trim
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is None:
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
