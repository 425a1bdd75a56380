"""The places of a model that methods are put at."""

from typing import Any, NamedTuple

import jaxpeft as jp


class Places(NamedTuple):
    """The sites of a model by what they do in a layer, and the sizes that go with it."""

    sites: jp.Sites
    queries: jp.Sites
    keys: jp.Sites
    values: jp.Sites
    attended: jp.Sites  # ends attention
    inputs: jp.Sites  # begins the feed-forward block
    outputs: jp.Sites  # ends it
    kernels: jp.Sites
    norms: jp.Sites
    summed: jp.Sites | None  # the norm of the feed-forward block's sum, where it is behind it
    table: jp.Sites
    width: int  # of the adapters: an eighth of the model's
    eps: float
    tokenizer: Any


def places(sites: jp.Sites, base: Any) -> Places:
    """The places of a task's base under "trunk"."""
    layer = "trunk/layers"
    behind = f"{layer}/mlp_norm/bias" in sites  # a decoder norms before its blocks
    first = "up" if f"{layer}/mlp/gate/kernel" not in sites else "gate"
    names = [f"{layer}/attn/{x}/kernel" for x in "qkvo"]
    names += [f"{layer}/mlp/{x}/kernel" for x in (first, "down")]
    return Places(
        sites,
        *(sites.match(name) for name in names),
        kernels=sites.match(f"{layer}/*kernel"),
        norms=sites.match(f"{layer}/*_norm/*"),
        summed=sites.match(f"{layer}/mlp_norm/*") if behind else None,
        table=sites.match("trunk/embed/embedding"),
        width=max(base.config.hidden_size // 8, 1),
        eps=base.config.norm_eps,
        tokenizer=base.tokenizer,
    )
