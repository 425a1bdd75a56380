"""P-tuning: a soft prompt whose rows are the output of a small trainable network."""

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
    """A soft prompt with rows encoder(e), where e is a trainable table; each task on its own."""

    w: Any = base_weight()
    rows: Any = axes("virtual", "embed")
    encoder: Any = arrays()
    kind: str = static("lstm")
    lengths: tuple[int, ...] = static(())

    is_mergeable = False
    is_reparameterized = True

    @property
    def extra_rows(self) -> int:
        """The number of virtual tokens, those of the base included."""
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
    init_std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """P-tuning: virtual tokens whose embeddings are the output of a small trainable network.

    With trainable embeddings e of shape (length, embed), the rows of the virtual tokens are

        "lstm"   MLP([LSTM forward(e), LSTM backward(e)]): an LSTM with `layers` layers of `hidden`
                 units in each direction; MLP is Linear(2 hidden, 2 hidden), ReLU,
                 Linear(2 hidden, width)
        "mlp"    Linear(embed, hidden), ReLU, Linear(hidden, hidden), ReLU, Linear(hidden, width)

    An LSTM layer has two bias vectors, as in PyTorch.

    Tasks have embeddings of their own and share the network. The adapter holds the network and
    the embeddings, so that training can be resumed; after training,
    `adapters.drop_reparameterization` replaces them by plain rows, as those of `prompt_tuning`.
    Virtual tokens may stand anywhere among real ones: see `prompts.prompt_template`.

    Args:
      length: Number of virtual tokens, or one number for each task; the ids of a task follow
        those of the task before.
      sites: The embedding table that the model looks token ids up in.
      encoder: "lstm" or "mlp".
      hidden: Hidden size of the network. `None` means the width of the model.
      layers: Number of layers of the LSTM.
      embed: Width of the trainable embeddings. `None` means the width of the model.
      init_std: The embeddings start at Normal(0, init_std ** 2).
      dtype: Dtype of the trainable parameters.

    Returns:
      A method whose trainable parameters are the embeddings, length * embed, and the network.

    Raises:
      ValueError: A length or width is less than 1, an unknown encoder, or a table for which
        `prompt_tuning` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, ids: p["embed"][ids], {"embed": jnp.ones((10, 4))}
      >>> table = jp.sites(f, params, jnp.array([1])).embedding
      >>> method = jp.p_tuning(2, table, encoder="mlp", hidden=8)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> frozen, adapter = jp.adapters.drop_reparameterization(frozen, adapter)
      >>> {path: x.shape for path, x in adapter.items()}
      {'embed/rows': (2, 4)}

    References:
      Liu et al., GPT Understands, Too, 2021, sections 3.1 and 3.2.
      https://arxiv.org/abs/2103.10385
    """
    lengths = (length,) if isinstance(length, int) else tuple(length)
    given = [n for n in (hidden, embed) if n is not None]
    if not lengths or min(*lengths, layers, *given, 1) < 1:
        raise ValueError(
            f"`p_tuning(length={length}, hidden={hidden}, layers={layers}, embed={embed})`: each "
            "of them must be at least 1, or None for the width of the model."
        )
    if encoder not in ENCODERS:
        raise ValueError(
            f"`p_tuning(encoder='{encoder}')`: `encoder` must be one of {list(ENCODERS)}."
        )

    def make(key: jax.Array, site: Site, view: View) -> View:
        check_table("p_tuning", site)
        width = site.size(OUT)
        first, second = jax.random.split(key)
        sizes = dict(embed=embed or width, hidden=hidden or width, width=width, layers=layers)
        rows = init_std * jax.random.normal(first, (sum(lengths), sizes["embed"]), dtype)
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
        init_std=init_std,
        dtype=dtype,
    )
    return Method(
        "p_tuning",
        options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="p_tuning"),
    )
