"""Virtual tokens: their ids, their places in a batch, prompt templates, and checks of a model."""

from jaxpeft.prompts._checks import check_prefix, check_prompt
from jaxpeft.prompts._tokens import check_token_ids, prompt_template, virtual_token_ids
from jaxpeft.prompts._virtual import (
    drop_virtual_positions,
    prepend_prefixes,
    prepend_virtual_tokens,
)

__all__ = [
    "check_prefix",
    "check_prompt",
    "check_token_ids",
    "drop_virtual_positions",
    "prepend_prefixes",
    "prepend_virtual_tokens",
    "prompt_template",
    "virtual_token_ids",
]
