"""What is expected of (client, column) besides the law: refusals, and faults that are known.

Everything that a change of the library may alter for the better stands here.
"""

_BOTH = "are among the keys and among the values. A weight that gives both at once cannot have a "
_CONV = "is no projection but .'conv'."
_POSITIONS = "is told of virtual positions .* but its input has leading axes"
_PART = "`ia3`: a part of the columns"

#: Refused, with a message that this pattern finds.
REFUSED: dict[tuple[str, str], str] = {
    # Images and sound have no placeholder tokens to stand in front of them.
    ("FlaxWav2Vec2Model", "prefix"): _POSITIONS,
    ("FlaxViTModel", "prefix"): _POSITIONS,
    ("FlaxBeitModel", "prefix"): _POSITIONS,
    ("FlaxDinov2Model", "prefix"): _POSITIONS,
    ("FlaxResNetModel", "prefix"): _CONV,
    ("FlaxRegNetModel", "prefix"): _CONV,
    ("Haiku MLP", "prefix"): _POSITIONS,
    ("Haiku ResNet", "prefix"): _CONV,
    ("Haiku MobileNet", "prefix"): _CONV,
    ("Equinox MLP", "prefix"): _POSITIONS,
    ("Equinox MLP as it is", "prefix"): _POSITIONS,
    ("Equinox LSTM", "prefix"): _POSITIONS,
    ("Equinox GRU", "prefix"): "adds 'cell/bias_n' of shape .16,. to the product",
    # A bias of a third of the outputs.
    ("Equinox GRU", "IA3"): "adds 'cell/bias_n' of shape .16,. .* 16 numbers for 48 outputs",
    ("Equinox convolutions", "prefix"): _CONV,
    # Fused kernels.
    ("FlaxGPT2LMHeadModel", "prefix"): _BOTH,
    ("FlaxBloomForCausalLM", "prefix"): _BOTH,
    ("FlaxGPT2LMHeadModel", "IA3"): _PART,
    ("FlaxBloomForCausalLM", "IA3"): _PART,
    ("Tunix Gemma 2", "prefix"): _BOTH,
    ("Tunix Gemma 3", "prefix"): _BOTH,
    ("Haiku LSTM", "prefix"): _BOTH,
    # The two halves of this kernel are multiplied apart from each other.
    ("Haiku GRU", "prefix"): "Prefix at 'gru/w_h' is no matrix, .* applies `split`",
}

_POOLER = "the pooler reads position 0, which is a placeholder, and nothing says so"
_HEADS = "kernels with as many outputs as the table of positions has rows count as heads"
_AS_IT_IS = "leaves that are no arrays end in an AttributeError without text"
_RUNNING = "running means count as biases, as they are subtracted from a product"
_SCALE_FIRST = "`w * x / rms`: a scale in front of the division is not that of a normalization"
_EINSUM = "a scale that an einsum applies counts as a linear weight of experts"

#: Wrong today; the test is a strict expected failure with this reason.
FAULTS: dict[tuple[str, str], str] = {
    ("FlaxBertForSequenceClassification", "prefix"): _POOLER,
    ("Haiku transformer", "sites"): _HEADS,
    ("Equinox transformer", "sites"): _HEADS,
    **{
        ("Equinox MLP as it is", column): _AS_IT_IS
        for column in ("sites", "roles", "LoRA", "DoRA", "IA3", "NF4 + LoRA", "prefix")
    },
    ("FlaxResNetModel", "roles"): _RUNNING,
    ("FlaxRegNetModel", "roles"): _RUNNING,
    ("FlaxWav2Vec2Model", "sites"): "the kernel under weight norm is not found",
    ("FlaxWav2Vec2Model", "roles"): "the kernel under weight norm counts as a norm's",
    ("Tunix Llama 3", "roles"): _SCALE_FIRST,
    ("Tunix Llama 3, tied and rematerialized", "roles"): _SCALE_FIRST,
    ("Penzai Llama", "roles"): _EINSUM,
    ("Penzai Gemma", "roles"): _EINSUM,
    ("Penzai Mistral, stacked", "roles"): _EINSUM,
    ("Penzai GPT-NeoX", "roles"): _EINSUM,
}

#: Clients of which some parameters are turned into dense arrays, and a pattern of these.
DENSE: dict[str, str] = {}
