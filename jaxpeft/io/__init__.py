"""Adapter folders: saved and loaded. Folders of models are read by `jaxpeft.models`."""

from jaxpeft.io._adapter import Loaded, load_adapter, save_adapter
from jaxpeft.io._description import UncheckedAdapterWarning

__all__ = ["Loaded", "UncheckedAdapterWarning", "load_adapter", "save_adapter"]
