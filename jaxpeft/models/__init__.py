"""Reference models that load and save Hugging Face folders, and task heads for any trunk."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxpeft.models._shifted import shifted_sparse

if TYPE_CHECKING:
    from jaxpeft.models import decoder, encoder, encoder_decoder, heads

__all__ = ["decoder", "encoder", "encoder_decoder", "heads", "shifted_sparse"]


def __getattr__(name: str) -> Any:
    """A model when it is first asked for."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
