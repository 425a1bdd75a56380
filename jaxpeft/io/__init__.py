"""Files: adapter folders, Hugging Face folders of models and of adapters."""

from jaxpeft.io._adapter import Loaded, load_adapter, save_adapter
from jaxpeft.io._description import UncheckedAdapterWarning

__all__ = ["Loaded", "UncheckedAdapterWarning", "load_adapter", "save_adapter"]
