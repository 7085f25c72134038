"""The folder of a search: what was asked, and what has been reached."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl

from lookup_tables.whole_file import write_whole


@final
class RunFolder:
    """Holds a run's files; the same settings go on in it, others are refused once something was reached.

    Args:
        path: the folder; made where it is absent.
        settings: what was asked, as JSON has it.

    Raises:
        ValueError: the folder holds a run with other settings, or something else's ``run.json``.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"a run needs a folder that it can make and write to; '{path}' is none "
                f"({error.strerror}): name another (--out)"
            ) from error
        asked = json.loads(json.dumps(dict(settings)))
        held = read_json(self._state, "run") if self._state.exists() else {"settings": asked}
        before = held.get("settings", {})
        changed = {name for name in {*asked, *before} if asked.get(name) != before.get(name)}
        if held.keys() == {"settings"}:  # nothing was reached that the settings decide
            held = {"settings": asked}
        elif changed:
            listed = ", ".join(
                f"{name}: {before.get(name)!r} there, {asked.get(name)!r} asked" for name in sorted(changed)
            )
            raise ValueError(
                f"'{path}' holds a run with other settings ({listed}); give the same to go on with it, "
                "another --out to start afresh, or remove the folder"
            )
        self._held: dict[str, Any] = held
        self._write()

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def get(self, name: str) -> Any:
        """A fact, or None."""
        return self._held.get(name)

    def update(self, **facts: Any) -> None:
        """Keeps facts that a later start of the same run goes on from."""
        self._held.update(facts)
        self._write()

    def checkpoint(self, step: str) -> Path:
        """Where a fit's last checkpoint lies."""
        return self.path / "checkpoints" / step / "last.ckpt"

    @property
    def _state(self) -> Path:
        return self.path / "run.json"

    def _write(self) -> None:
        write_json(self._state, self._held)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that is there whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object from a file. Raises ``ValueError`` that says what ``kind`` of file it should be."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no {kind} file at '{path}'") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is no {kind} file: it is truncated or not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' is no {kind} file: it holds a {type(content).__name__}, not an object")
    return content


@final
class MetricsFile(pl.Callback):
    """Writes what was logged to one CSV file for all fits of a run, a row an epoch.

    A fit that is resumed replaces its rows from the epoch on where it resumes. (Lightning's ``CSVLogger``
    empties its file at every start.)

    Args:
        path: the file, shared by the fits.
        step: name of this fit, in the first column.
    """

    def __init__(self, path: Path, step: str) -> None:
        self._path = path
        self._step = step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        logged = {name: round(float(value), 6) for name, value in sorted(trainer.callback_metrics.items())}
        epoch = trainer.current_epoch
        rows = [row for row in self._rows() if row["step"] != self._step or int(row["epoch"]) < epoch]
        rows.append({"step": self._step, "epoch": str(epoch), **{k: str(v) for k, v in logged.items()}})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, text.getvalue())

    def _rows(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            return [dict(row) for row in csv.DictReader(file)]
