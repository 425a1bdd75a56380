"""Checkpoints of a run: adapter, optimizer state, step and data position, in one piece.

    folder/<step>/adapter    {path: array}, readable by any orbax manager
    folder/<step>/optimizer  {path in the optimizer state: array}, and the step
    folder/<step>/run        JSON: what the loop needs beyond arrays

Orbax writes a step into a folder of another name and renames it at the end, so a step that
has its name is whole.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxpeft._errors import UserError
from jaxpeft.optim._paging import HOST_MEMORY, to_host
from jaxpeft.train._step import State

_args = ocp.args


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them.

    Args:
      folder: Made where it does not exist.
      keep: How many to keep, `None` for all.
    """

    def __init__(self, folder: str | Path, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"`keep` is how many checkpoints to keep, at least 1; got {keep}.")
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # An adapter is small. In exchange a failed save is known at once, at its step.
            enable_async_checkpointing=False,
            # What a killed process has left half-written.
            cleanup_tmp_directories=True,
        )
        with _readable(f"cannot use {self.folder} for checkpoints"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=options,
                item_names=("adapter", "optimizer", "run"),
                item_handlers={  # named here, so that metadata can be read before any save
                    "adapter": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )

    def steps(self) -> list[int]:
        """The steps that are there, all of them whole."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, run: dict[str, Any]) -> None:
        """Writes `state` and the JSON-like `run`, and returns when they are on disk.

        Raises:
          UserError: where it could not be written. What was written of it is removed, and
            the checkpoints of earlier steps stand.
        """
        step = int(state.step)
        items = _args.Composite(
            adapter=_args.StandardSave(_stored(state.adapter)),
            optimizer=_args.StandardSave(_stored(_optimizer(state))),
            run=_args.JsonSave(run),
        )
        try:
            _reserve(self.folder, state)
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            for half in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
            last = self.steps()
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {_reason(error)}. "
                f"The last whole one is {f'of step {last[-1]}' if last else 'none'}. Make room "
                f"there or choose another folder, then start again to go on from it."
            ) from error

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """The state and `run` of a step, the newest by default.

        Args:
          like: A state of the same adapter and optimizer (`init(adapter, tx)`): its structure,
            and where each array lies.
        Raises:
          UserError: where there is no such step, where the checkpoint belongs to another
            adapter or optimizer (the first difference is named), or where it is damaged.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise UserError(f"no {wanted} in {self.folder}; it has steps {steps}.")
        step = steps[-1] if step is None else step
        wanted_state = {"adapter": like.adapter, "optimizer": _optimizer(like)}
        place = f"the checkpoint {self.folder / str(step)}"
        with _readable(f"{place} cannot be read"):
            metadata = self._manager.item_metadata(step)
            for item, tree in wanted_state.items():
                _check_same(place, item, _stored(tree), metadata[item])
            restored = self._manager.restore(
                step,
                args=_args.Composite(
                    adapter=_args.StandardRestore(_abstract(wanted_state["adapter"])),
                    optimizer=_args.StandardRestore(_abstract(wanted_state["optimizer"])),
                    run=_args.JsonRestore(),
                ),
            )
        adapter = _placed(restored["adapter"], like.adapter)
        number, *leaves = _placed(restored["optimizer"], wanted_state["optimizer"]).values()
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
        return State(number, adapter, opt_state), restored["run"]

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _optimizer(state):
    """{path: array}: the step, then the optimizer's leaves in their order."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {"step": state.step} | {jax.tree_util.keystr(path): x for path, x in leaves}


def _stored(tree):
    """Without arrays of no elements, which orbax refuses."""
    return {path: x for path, x in tree.items() if x.size}


def _abstract(tree):
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for path, x in _stored(tree).items()
    }


def _placed(restored, like):
    """Each array where its like is; without a fixed place where the like has none.

    An array that is committed to one device could not meet a base that is spread over many.
    """

    def place(path, x):
        if not x.size:
            return x
        if not _is_key(x) and x.sharding.memory_kind == HOST_MEMORY:
            return to_host(restored[path], min_size=1)
        if x.committed or _is_key(x):
            return restored[path]
        return jnp.asarray(np.asarray(restored[path]))

    return {path: place(path, x) for path, x in like.items()}


def _check_same(place, item, want, found):
    found = {} if found is None else dict(found.items())
    for path in [*want, *found]:
        if path not in found:
            problem = f"lacks {path!r}"
        elif path not in want:
            problem = f"has {path!r}, which this run lacks"
        elif _is_key(want[path]):
            continue  # stored as the integers of which it is made
        elif tuple(found[path].shape) != want[path].shape:
            problem = f"has shape {tuple(found[path].shape)} at {path!r}, not {want[path].shape}"
        elif (dtype := found[path].dtype) is not None and str(dtype) != str(want[path].dtype):
            problem = f"has dtype {dtype} at {path!r}, not {want[path].dtype}"
        else:
            continue
        raise UserError(
            f"{place} belongs to another run: its {item} {problem}. Use the method and optimizer "
            f"that it was made with, or another folder."
        )


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _reserve(folder, state):
    """Fails where the disk has no room for the state, before anything is written.

    Out of the middle of a save, orbax's threads report a full disk in many voices.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    size = sum(x.nbytes for x in jax.tree.leaves(state) if not _is_key(x)) + 2**16
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


class _readable:
    """Turns what orbax raises into one line."""

    def __init__(self, problem):
        self.problem = problem

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"{self.problem}: {_reason(error)}.") from error


def _reason(error):
    """The first line of the innermost cause: what the system said."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
