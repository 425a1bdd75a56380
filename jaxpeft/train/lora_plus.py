"""LoRA+: one learning rate for `a`, a larger one for `b`."""

from collections.abc import Callable, Mapping
from typing import Any

import optax


def lora_plus(
    optimizer: Callable[[Any], optax.GradientTransformation],
    rate: float | Callable[[Any], Any],
    *,
    ratio: float = 16.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose rate is `ratio` times as large for the arrays called `b`.

    Args:
      optimizer: From a rate or a schedule to an optimizer, such as `optax.adamw`.
      rate: Of everything else, `a` above all: a number, or a schedule.
      ratio: 16 in the paper, for `a` at a rate as for LoRA or a little below.

    Returns:
      A transformation of adapters `{path: array}`.

    Raises:
      ValueError: A ratio that is not positive; from `init`, an adapter without a `b`.

    Example:
      >>> import optax
      >>> tx = lora_plus(optax.adamw, 1e-4)

    References:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, section 4.
      https://arxiv.org/abs/2402.12354
    """
    if ratio <= 0:
        raise ValueError(f"`lora_plus(ratio={ratio})`: a positive number is needed.")

    def larger(step: Any) -> Any:
        return ratio * rate(step)  # type: ignore[operator]

    def labels(adapter: Mapping[str, Any]) -> dict[str, str]:
        found = {path: "b" if path.rpartition("/")[2] == "b" else "other" for path in adapter}
        if "b" not in found.values():
            raise ValueError(
                f"`lora_plus`: no array of this adapter is called `b`; it has {sorted(adapter)}. "
                "It is for LoRA and the methods that start as it does."
            )
        return found

    fast = larger if callable(rate) else ratio * rate
    return optax.partition({"b": optimizer(fast), "other": optimizer(rate)}, labels)
