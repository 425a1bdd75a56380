"""What is expected of (client, column) besides the law: refusals, and faults that are known.

Everything that a change of the library may alter for the better stands here.
"""

_BOTH = "are among the keys and among the values. A weight that projects to both at once cannot"
_CONV = "as conv, which is not a projection"
_POSITIONS = "was given virtual positions .* but its input has leading axes"

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
    ("Equinox GRU", "IA3"): "adds 'cell/bias_n' of shape .16,. .* 16 entries for 48 outputs",
    ("Equinox convolutions", "prefix"): _CONV,
    # Its pooler reads position 0, which `check_prefix` says.
    (
        "FlaxBertForSequenceClassification",
        "prefix",
    ): "output 0 of shape .* depends on a placeholder",
    # Fused kernels.
    ("FlaxGPT2LMHeadModel", "prefix"): _BOTH,
    ("FlaxBloomForCausalLM", "prefix"): _BOTH,
    ("Tunix Gemma 2", "prefix"): _BOTH,
    ("Tunix Gemma 3", "prefix"): _BOTH,
    ("Haiku LSTM", "prefix"): _BOTH,
    # The two halves of this kernel are multiplied apart from each other.
    ("Haiku GRU", "prefix"): "Prefix at 'gru/w_h' has no dense equivalent, .* applies `split`",
}

#: Wrong today; the test is a strict expected failure with this reason.
FAULTS: dict[tuple[str, str], str] = {}

#: Clients of which some parameters are turned into dense arrays, and a pattern of these.
DENSE: dict[str, str] = {"FlaxWav2Vec2Model": r"weight_v"}
