"""Checkpoints of a run: adapter, optimizer state, step and data position, in one piece.

    directory/<step>/adapter    {path: array}, readable by any orbax manager
    directory/<step>/optimizer  {path in the optimizer state: array}, and the step
    directory/<step>/run        JSON: what the loop needs beyond arrays, and the SHA-256 of all

Orbax writes a step into a folder of another name and renames it at the end, so a step that
has its name is complete. What is restored is compared with its hashes, so a checkpoint that
has changed on disk is refused.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
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

#: The JSON of `run` is `{"format": 2, "run": ..., "sha256": {name: hex digest}}`. In format 1,
#: which can still be read, it was the value of "run" alone.
_FORMAT = 2
_KEYS = {"format", "run", "sha256"}

_RESTORE_ANOTHER = (
    "Delete this folder to resume from the checkpoint before it, or replace it with an intact copy."
)


class Checkpoints:
    """The checkpoints in one directory, the newest `max_to_keep` of them.

    Args:
      directory: Created where it does not exist.
      max_to_keep: How many checkpoints are kept, the newest ones. `None`: all.
    Raises:
      UserError: where the directory cannot be used.
      ValueError: for `max_to_keep` below 1.
    """

    def __init__(self, directory: str | Path, max_to_keep: int | None = 3):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(
                f"`max_to_keep` is a number of checkpoints, at least 1; got {max_to_keep}. None "
                f"keeps all."
            )
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            # An adapter is small, and so a failed save is known at once, at its step.
            enable_async_checkpointing=False,
            # What a killed process has left half-written.
            cleanup_tmp_directories=True,
        )
        with _readable(f"cannot use {self.directory} for checkpoints"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_names=("adapter", "optimizer", "run"),
                item_handlers={  # named here, so that metadata can be read before any save
                    "adapter": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, run: dict[str, Any]) -> None:
        """Writes `state` and `run`, and returns when they are on disk.

        Args:
          state: Adapter, optimizer state and step.
          run: What else the run needs to be resumed, in values that JSON has.
        Raises:
          UserError: where it could not be written. What was written of it is removed; the
            checkpoints of earlier steps stay.
        """
        step = int(state.step)
        arrays = {"adapter": _stored(state.adapter), "optimizer": _stored(_optimizer(state))}
        hashed = {"format": _FORMAT, "run": run, "sha256": _digests(arrays, run)}
        items = _args.Composite(
            adapter=_args.StandardSave(arrays["adapter"]),
            optimizer=_args.StandardSave(arrays["optimizer"]),
            run=_args.JsonSave(hashed),
        )
        try:
            _reserve(self.directory, state)
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            for half in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
            steps = self.steps()
            last = f"The last complete one is of step {steps[-1]}" if steps else "There is none yet"
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.directory}: "
                f"{_reason(error)}. {last}. Make room there or choose another folder, then start "
                f"the run again: it resumes from the last complete checkpoint."
            ) from error

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """The state and `run` of a step, the newest by default.

        Args:
          like: A state of the same adapter and optimizer (`init(adapter, tx)`): its structure,
            and the device or sharding of each array.
          step: Which checkpoint, `None` for the newest.
        Raises:
          UserError: where there is no such step, where the checkpoint belongs to another
            adapter or optimizer (the first difference is named), or where it is damaged: it
            cannot be read, or differs from its hashes.
        Warns:
          UserWarning: where the checkpoint was written before there were hashes, so that damage
            cannot be found.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise UserError(f"no {wanted} in {self.directory}; it has steps {steps}.")
        step = steps[-1] if step is None else step
        wanted_state = {"adapter": like.adapter, "optimizer": _optimizer(like)}
        checkpoint = f"the checkpoint {self.directory / str(step)}"
        with _readable(f"{checkpoint} cannot be read", f" {_RESTORE_ANOTHER}"):
            metadata = self._manager.item_metadata(step)
            for item, tree in wanted_state.items():
                _check_same(checkpoint, item, _stored(tree), metadata[item])
            restored = self._manager.restore(
                step,
                args=_args.Composite(
                    adapter=_args.StandardRestore(_abstract(wanted_state["adapter"])),
                    optimizer=_args.StandardRestore(_abstract(wanted_state["optimizer"])),
                    run=_args.JsonRestore(),
                ),
            )
        run = _checked(checkpoint, restored)
        adapter = _placed(restored["adapter"], like.adapter)
        number, *leaves = _placed(restored["optimizer"], wanted_state["optimizer"]).values()
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
        return State(number, adapter, opt_state), run

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


def _digests(arrays, run):
    """{name: SHA-256} of `run`, and of each array that this process can read as a whole."""
    digests = {"run": _sha256(json.dumps(_as_json(run), sort_keys=True).encode())}
    for item, tree in arrays.items():
        for path, x in tree.items():
            if x.is_fully_addressable or x.is_fully_replicated:
                values = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
                head = f"{values.dtype} {values.shape} ".encode()
                digests[f"{item} {path}"] = _sha256(head, _raw(values))
    return digests


def _raw(values):
    """The bytes of an array without a copy; NumPy exports no buffer of bfloat16."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _sha256(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _as_json(run):
    """As it is read again: tuples are lists, and all keys are strings."""
    return json.loads(json.dumps(run))


def _checked(checkpoint, restored):
    """The `run` of a checkpoint, which must be as it was when it was saved, like its arrays."""
    stored = restored["run"]
    if not (isinstance(stored, dict) and _KEYS & stored.keys()):
        warnings.warn(
            f"{checkpoint} was written without content hashes, by an earlier version, so damage to "
            f"it cannot be detected. The next checkpoint of this run has hashes.",
            stacklevel=3,
        )
        return stored
    problem = None
    if stored.keys() != _KEYS or not isinstance(stored["sha256"], dict):
        problem = f"its run data has the keys {sorted(stored)}, not {sorted(_KEYS)}"
    elif stored["format"] != _FORMAT:
        problem = f"its run data has format {stored['format']!r}, and this version reads {_FORMAT}"
    else:
        arrays = {item: restored[item] for item in ("adapter", "optimizer")}
        want, found = stored["sha256"], _digests(arrays, stored["run"])
        names = {f"{item} {path}" for item, tree in arrays.items() for path in tree} | {"run"}
        if strange := sorted(want.keys() - names):
            problem = f"it has a hash for {strange[0]!r}, and no array of this name"
        # An array that was spread over processes when it was saved has no hash.
        elif wrong := [n for n in found if want.get(n, found[n]) != found[n]]:
            name = "run data" if wrong[0] == "run" else wrong[0]
            problem = f"its {name} differs from the hash that was saved with it"
        elif "run" not in want:
            problem = "the hash of its run data is missing"
    if problem:
        raise UserError(f"{checkpoint} is damaged: {problem}. {_RESTORE_ANOTHER}")
    return stored["run"]


def _abstract(tree):
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for path, x in _stored(tree).items()
    }


def _placed(restored, like):
    """Each array on the devices of its like, and uncommitted where its like is uncommitted.

    An array that is committed to one device could not be used with a base on several devices.
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


def _check_same(checkpoint, item, want, found):
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
            f"{checkpoint} belongs to another run: its {item} {problem}. Use the method and the "
            f"optimizer of that run, or another folder."
        )


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _reserve(folder, state):
    """Fails where the disk has no room for the state, before anything is written.

    In the middle of a save, the threads of orbax would report a full disk many times over.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    size = sum(x.nbytes for x in jax.tree.leaves(state) if not _is_key(x)) + 2**16
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


class _readable:
    """Turns what orbax raises into a `UserError` of one line."""

    def __init__(self, problem, way_out=""):
        self.problem, self.way_out = problem, way_out

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"{self.problem}: {_reason(error)}.{self.way_out}") from error


def _reason(error):
    """The first line of the innermost cause, which is the message of the operating system."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if len(line) <= 300 else f"{line[:300]}..."  # tensorstore appends its whole spec
