"""What a run leaves behind and what it shows: the metrics file, progress, the loss figure."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from jaxpeft._errors import UserError, need


class MetricsFile:
    """Records of a run, one JSON object per line, each with its `step`.

    A record holds nothing that two runs of the same steps could differ in, no time of day and
    no rate, so that a run stopped and resumed leaves the same bytes as one never stopped.
    """

    def __init__(self, path: Path, step: int | None):
        """Opens the file to go on after `step`; later records are dropped, `None`: all."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = 0 if step is None else _bytes_up_to(path, step)
        self._file = open(path, "ab")
        self._file.truncate(kept)

    def write(self, **record: Any) -> None:
        """Appends one record. A number that is not finite, which JSON lacks, becomes null."""
        record = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in record.items()
        }
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when the records are on disk: before the checkpoint that vouches for them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _bytes_up_to(path, step):
    """Length of the whole records of steps up to this one."""
    size = 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            size += len(line)
    return size


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in the order of the run."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Progress:
    """A line on the terminal: steps, loss, target tokens per second, time left.

    Args:
      start: Steps already taken.
      steps: Steps in all, or `None` where the data decides.
      show: `None` shows it where stderr is a terminal and rich is installed; "lines" prints one
        to stdout, which may be a file, after each `note`.
    """

    def __init__(self, start: int, steps: int | None, show: bool | str | None):
        self._bar = None if show in (False, "lines") else _bar(show)
        self._prints = show == "lines"
        self._step, self._steps = start, steps
        self._begin: float | None = None
        self._seconds = 0.0
        self._tokens = 0.0
        self._texts = {"loss": "", "held out": "", "rate": ""}
        if self._bar is not None:
            self._task = self._bar.add_task(
                "", total=steps, completed=start, text="compiling", start=False
            )
            self._bar.start()

    @property
    def rate(self) -> float | None:
        """Target tokens per second, the compilation of the first step not counted."""
        return self._tokens / self._seconds if self._seconds else None

    def advance(self, step: int, loss: float, tokens: float) -> None:
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
        """Shows `text` from now on, in the place of the last one of this name."""
        self._texts[name] = text
        if self._bar is not None:
            self._bar.update(self._task, text=self._text())
        if self._prints:
            of = "" if self._steps is None else f"/{self._steps}"
            # At once: Python holds back what is not for a terminal.
            print(f"step {self._step}{of}  {self._text()}", flush=True)

    def _text(self):
        return "  ".join(filter(None, self._texts.values()))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def check_progress(show: bool | str | None) -> None:
    """Refuses progress that cannot be shown."""
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
    """What drawing would fail at, known before the run that is drawn at its end.

    Raises:
      UserError: without matplotlib, for an ending that it does not draw, and for a folder that is
        not there.
    """
    canvas = need("matplotlib.figure", "figure", "a loss figure").Figure().canvas
    file = Path(figure)
    endings = sorted(canvas.get_supported_filetypes())
    if file.suffix[1:].lower() not in endings:
        raise UserError(
            f"{file} ends in {file.suffix!r}, which cannot be drawn. These can: "
            f"{', '.join(endings)}."
        )
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be drawn: there is no folder {file.parent}. Make it first.")


def loss_figure(metrics: str | Path, figure: str | Path) -> None:
    """Draws training and held-out loss over steps from a metrics file.

    Args:
      metrics: The JSONL file that `fit` writes.
      figure: Where to write; its ending says the format (.png, .svg, .pdf).
    Raises:
      UserError: as `check_figure`, and where there is nothing to draw.
    """
    check_figure(figure)
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    if not records:
        raise UserError(f"{metrics} holds no records to draw.")
    # Figure alone, without pyplot: no display, no window, no state of the process.
    axes = (canvas := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    for name, label, style in [("loss", "training", "-"), ("held_out_loss", "held out", "o-")]:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    axes.legend()
    canvas.savefig(figure, dpi=150)
