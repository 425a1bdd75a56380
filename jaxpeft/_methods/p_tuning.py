"""P-tuning: rows of a soft prompt that a small network makes of trained ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.prompt_encoders import ENCODERS, encode, init_encoder
from jaxpeft._methods.prompt_tuning import SoftPrompt, check_table, extra_rows_of
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import (
    OUT,
    Weight,
    arrays,
    axes,
    base_weight,
    static,
    weight,
)
from jaxpeft.extend._apply import apply_to_sites


@weight
class EncodedPrompt(Weight):
    """A prompt whose rows a network makes of trained ones, those of each task by themselves."""

    w: Any = base_weight()
    rows: Any = axes("virtual", "embed")
    encoder: Any = arrays()
    kind: str = static("lstm")
    lengths: tuple[int, ...] = static(())

    is_mergeable = False
    is_reparameterized = True

    @property
    def extra_rows(self) -> int:
        """Virtual tokens on top of those that the base serves."""
        return extra_rows_of(self.w) + self.rows.shape[-2]

    def derived(self):
        return {"rows": encode(self.kind, self.encoder, self.rows.array, self.lengths)}

    def acting(self, **derived):
        return SoftPrompt(self.w, **derived)


@register_method
def p_tuning(
    length: int | Sequence[int],
    sites: Sites,
    *,
    encoder: Literal["lstm", "mlp"] = "lstm",
    hidden: int | None = None,
    layers: int = 2,
    embed: int | None = None,
    std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """P-tuning: virtual tokens whose embeddings a small network makes of trained ones.

    With "lstm", h = MLP([LSTM forward, LSTM backward](e)), where the LSTM has `layers` layers of
    `hidden` units in each direction and the MLP is Linear(2 hidden, 2 hidden), ReLU,
    Linear(2 hidden, width); with "mlp", Linear(embed, hidden), ReLU, Linear(hidden, hidden),
    ReLU, Linear(hidden, width). An LSTM layer has both of PyTorch's bias vectors.

    Tasks have a table each and share the network. After training, `fold` leaves plain rows, those
    of `prompt`; until then encoder and tables are the adapter, so training can be resumed. Virtual
    tokens stand anywhere among real ones: see `template`.

    Args:
      length: Virtual tokens, or those of each task; their ids follow each other.
      sites: The embedding table that token ids are looked up in.
      encoder: "lstm" or "mlp".
      hidden: Units of the network. `None` takes the width of the model.
      layers: Of the LSTM.
      embed: Width of the trained embeddings. `None` takes that of the model.
      std: Embeddings start at Normal(0, std ** 2).
      dtype: Of what is trained.

    Returns:
      A method with length * embed trained numbers, and those of the network.

    Raises:
      ValueError: A length or width is not positive, an unknown encoder, or a table as for
        `prompt`.

    References:
      Liu et al., GPT Understands, Too, 2021, sections 3.1 and 3.2.
      https://arxiv.org/abs/2103.10385
    """
    lengths = (length,) if isinstance(length, int) else tuple(length)
    given = [n for n in (hidden, embed) if n is not None]
    if not lengths or min(*lengths, layers, *given, 1) < 1:
        raise ValueError(
            f"`p_tuning(length={length}, hidden={hidden}, layers={layers}, embed={embed})`: all of "
            "them are positive."
        )
    if encoder not in ENCODERS:
        raise ValueError(f"`p_tuning(encoder='{encoder}')`: choose of {list(ENCODERS)}.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        check_table("p_tuning", site)
        width = site.size(OUT)
        first, second = jax.random.split(key)
        sizes = dict(embed=embed or width, hidden=hidden or width, width=width, layers=layers)
        rows = std * jax.random.normal(first, (sum(lengths), sizes["embed"]), dtype)
        network = jax.tree.map(Trainable, init_encoder(second, encoder, dtype=dtype, **sizes))
        weight = EncodedPrompt(view.weight, Trainable(rows), network, encoder, lengths)
        return dataclasses.replace(view, weight=weight)

    options = dict(
        length=length if isinstance(length, int) else list(lengths),
        sites=sites,
        encoder=encoder,
        hidden=hidden,
        layers=layers,
        embed=embed,
        std=std,
        dtype=dtype,
    )
    return Method(
        "p_tuning",
        options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="p_tuning"),
    )
