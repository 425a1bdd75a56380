"""A plan: which tensors of a folder each parameter is made of; and how faults are listed.

A plan is {path: `Stack`}, with one `Stack` for every parameter of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxpeft.io._safetensors import MAX_FAULTS, Tensor

__all__ = ["Stack", "folder_of", "refuse"]


class Stack(NamedTuple):
    """How one parameter is made of tensors: of one per layer, or of a single one."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool  # True: a tensor per index of the first axis. False: one tensor is all of it
    transposed: bool  # (out, in) in the file, (in, out) in the parameter

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the file."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def is_matrix(self) -> bool:
        """Whether each tensor is a matrix."""
        return len(self.tensor_shape) == 2


def refuse(head: str, faults: Sequence[str], remedy: str = "") -> None:
    """Raises one ValueError with all faults, if there are any."""
    if faults:
        more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        lines = "".join(f"\n  {fault}" for fault in [*faults[:MAX_FAULTS], *more])
        raise ValueError(head + lines + (remedy and "\n" + remedy))


def folder_of(tensors: Mapping[str, Tensor]) -> str:
    """The folder that holds the tensors, for messages."""
    return ", ".join(sorted({str(tensor.file.parent) for tensor in tensors.values()}))
