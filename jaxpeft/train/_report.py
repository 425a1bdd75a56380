"""What a run writes and shows: the metrics file, the progress bar, the loss figure."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from jaxpeft._errors import UserError, need


class MetricsFile:
    """Records of a run, one JSON object per line, each with its `step`.

    A record has nothing in which two runs of the same steps could differ, no time and no
    throughput, so that a run that is stopped and resumed writes the same bytes as one that is not.
    """

    def __init__(self, path: Path, step: int | None):
        """Opens the file to continue after `step`; later records are removed, with `None` all."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = 0 if step is None else _bytes_up_to(path, step)
        self._file = open(path, "ab")
        self._file.truncate(kept)

    def write(self, **record: Any) -> None:
        """Appends one record. Numbers that are not finite, which JSON lacks, become null."""
        record = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in record.items()
        }
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when the records are on disk. To be called before their checkpoint is saved."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _bytes_up_to(path, step):
    """Length in bytes of the complete records of steps up to this one."""
    size = 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            size += len(line)
    return size


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of the metrics file that `fit` writes, in the order of the run.

    Each is a dict with `step` and either `loss`, `grad_norm`, `tokens` (target tokens) and, where
    the step was not taken, `skipped`; or `eval_loss` and `eval_perplexity`.

    Args:
      path: The file, one JSON object per line.
    """
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Progress:
    """A progress bar: steps, loss, target tokens per second, time left.

    Args:
      start: Steps already taken.
      steps: Steps in all, or `None` where the end of the data decides.
      show: `None` shows the bar where stderr is a terminal and rich is installed, `True` always,
        `False` never; "lines" prints a line to stdout, which may be a file, after each `note`.
    """

    def __init__(self, start: int, steps: int | None, show: bool | str | None):
        self._bar = None if show in (False, "lines") else _bar(show)
        self._prints = show == "lines"
        self._step, self._steps = start, steps
        self._begin: float | None = None
        self._seconds = 0.0
        self._tokens = 0.0
        self._texts = {"loss": "", "eval loss": "", "rate": ""}
        if self._bar is not None:
            self._task = self._bar.add_task(
                "", total=steps, completed=start, text="compiling", start=False
            )
            self._bar.start()

    @property
    def rate(self) -> float | None:
        """Target tokens per second after the first step, which includes the compilation."""
        return self._tokens / self._seconds if self._seconds else None

    def advance(self, step: int, loss: float, tokens: float) -> None:
        """Shows a step that was taken, its loss and its number of target tokens."""
        self._step = step
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
        else:
            self._tokens += tokens
            self._seconds = now - self._begin
        rate = "" if self.rate is None else f"{self.rate:,.0f} tokens/s"
        self._texts |= {"loss": f"loss {loss:.4f}", "rate": rate}
        if self._bar is not None:
            if self._tokens == 0:
                self._bar.start_task(self._task)
            self._bar.update(self._task, completed=step, text=self._text())

    def note(self, name: str, text: str) -> None:
        """Shows `text` from now on, instead of the last one of this name."""
        self._texts[name] = text
        if self._bar is not None:
            self._bar.update(self._task, text=self._text())
        if self._prints:
            of = "" if self._steps is None else f"/{self._steps}"
            # Flushed, since Python buffers output that does not go to a terminal.
            print(f"step {self._step}{of}  {self._text()}", flush=True)

    def _text(self):
        return "  ".join(filter(None, self._texts.values()))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def check_progress(show: bool | str | None) -> None:
    """Raises ValueError for an unknown option, UserError where rich is needed and missing."""
    if show not in (None, True, False, "lines"):
        raise ValueError(f'`progress` is None, True, False or "lines", got {show!r}.')
    if show is True:
        _rich()


def _rich():
    return tuple(need(f"rich.{part}", "train", "progress=True") for part in ("console", "progress"))


def _bar(show):
    try:
        console, progress = _rich()
    except UserError:
        if show:
            raise
        return None
    terminal = console.Console(stderr=True)
    if show is None and not terminal.is_terminal:
        return None
    return progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=terminal,
    )


def check_figure(figure: str | Path) -> None:
    """Checks before a run that its loss can be drawn at the end.

    Raises:
      UserError: where matplotlib is not installed, for a suffix that it does not support, and for a
        folder that does not exist.
    """
    canvas = need("matplotlib.figure", "figure", "a loss figure").Figure().canvas
    file = Path(figure)
    formats = sorted(canvas.get_supported_filetypes())
    if file.suffix[1:].lower() not in formats:
        raise UserError(
            f"{file} has the suffix {file.suffix!r}, which is not a format of figures. Use one of "
            f"{', '.join(formats)}."
        )
    if not file.parent.is_dir():
        raise UserError(f"cannot draw {file}: there is no folder {file.parent}. Create it first.")


def plot_loss(metrics: str | Path, figure: str | Path) -> None:
    """Draws training and evaluation loss over steps from a metrics file.

    Args:
      metrics: The JSONL file that `fit` writes.
      figure: Where to write; its suffix is the format (.png, .svg, .pdf).
    Raises:
      UserError: where matplotlib is not installed, for an unknown suffix, for a folder that does
        not exist, and for a metrics file without records.
    """
    check_figure(figure)
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    if not records:
        raise UserError(f"{metrics} has no records to draw.")
    # Without pyplot, which would need a display and keep global state.
    axes = (canvas := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    for name, label, style in [("loss", "training", "-"), ("eval_loss", "evaluation", "o-")]:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    axes.legend()
    canvas.savefig(figure, dpi=150)
