"""Takes in nn-Meter's published predictors: checks each file, and converts it without running its pickle."""

from __future__ import annotations

import datetime
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import IO, Any, final

from lookup_tables.progress import Progress
from profilers.nn_meter.official import OFFICIAL
from profilers.nn_meter.pickles import RefusedPickleError, read_forest
from profilers.nn_meter.predictor import save_predictor
from profilers.nn_meter.regression import KernelPredictor

_RULES = "fusion_rules.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_BLOCK = 1 << 20
_LARGEST_RULES = 1 << 20


def import_predictor(
    source: str | Path,
    *,
    name: str | None = None,
    folder: Path | None = None,
    allow_unknown: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Converts pickled forests to plain arrays, one kernel after the other.

    Each file's size and sha256 are compared with nn-Meter's own Git LFS pointer first, then it is read by
    `read_forest`, which runs nothing. The largest file decides how much memory that takes (two to three
    times its size). An archive is not unpacked.

    Args:
        source: a folder or a zip with ``KERNEL.pkl`` files and ``fusion_rules.json``, in a folder of the
            predictor's name or at the top.
        name: of the predictor; where it is not given, that of its folder or zip.
        folder: of all predictors.
        allow_unknown: take files that no pointer is known of, or that differ from theirs; they are read in
            the same way, and what they predict is theirs.
        progress: told which kernel is read, how many are done, and how many there are.

    Returns:
        The predictor's folder.

    Raises:
        ValueError: something is missing, differs from what nn-Meter published, or is no forest.
    """
    files = _Source(Path(source))
    name = name or files.name
    report = progress or (lambda what, done, total: None)
    pickles = files.pickles()
    if not pickles or _RULES not in files.members:
        raise ValueError(
            f"'{source}' must hold KERNEL.pkl files and {_RULES}; it holds "
            f"{', '.join(files.members) or 'nothing'}. Give the folder or the zip of one predictor"
        )
    official = OFFICIAL[name].files if name in OFFICIAL else {}
    sources: dict[str, dict[str, Any]] = {}
    for kind in pickles:
        sources[kind] = facts = _digest(files, kind)
        if allow_unknown:
            continue
        known = official.get(kind)
        if known is None:
            raise ValueError(
                f"no size and sha256 of {kind}.pkl of {name!r} are known (of these they are: "
                f"{', '.join(official) or 'none'}); if you trust where it comes from, allow unknown files: "
                "--allow-unknown. Nothing in it is run either way"
            )
        if (known.sha256, known.size) != (facts["sha256"], facts["size"]):
            raise ValueError(
                f"{kind}.pkl must have {known.size} bytes with sha256 {known.sha256}, as nn-Meter published "
                f"it; it has {facts['size']} bytes with {facts['sha256']}. Fetch it again, or take it as it "
                "is: --allow-unknown"
            )

    def converted() -> Iterator[KernelPredictor]:
        for done, kind in enumerate(pickles):
            report(f"reading {kind}", done, len(pickles))
            with files.open(f"{kind}.pkl") as file:
                try:
                    forest = read_forest(file)
                except RefusedPickleError as error:
                    raise RefusedPickleError(f"{kind}.pkl of '{source}' is refused: {error}") from error
            yield KernelPredictor(kind, forest)
        report("done", len(pickles), len(pickles))

    facts = {
        "source": str(source),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "files": sources,
    }
    return save_predictor(name, converted(), _rules(files), facts, folder)


@final
class _Source:
    """The files of a folder or of a zip, by their last name; nothing is written."""

    def __init__(self, path: Path) -> None:
        self._zip: zipfile.ZipFile | None = None
        self.name = path.name.removesuffix(".zip")
        if path.is_dir():
            inner = path / self.name if (path / self.name).is_dir() else path
            self.members: Mapping[str, str] = {p.name: str(p) for p in sorted(inner.iterdir()) if p.is_file()}
        else:
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"'{path}' is neither a folder nor a zip ({error}); give one with nn-Meter's predictor"
                ) from error
            names = sorted(info.filename for info in self._zip.infolist() if not info.is_dir())
            self.members = {PurePosixPath(member).name: member for member in names}

    def pickles(self) -> list[str]:
        return [member.removesuffix(".pkl") for member in self.members if member.endswith(".pkl")]

    def open(self, member: str) -> AbstractContextManager[IO[bytes]]:
        inner = self.members[member]
        return open(inner, "rb") if self._zip is None else self._zip.open(inner)


def _digest(files: _Source, kind: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with files.open(f"{kind}.pkl") as file:
        while block := file.read(_BLOCK):
            if not size and block.startswith(_POINTER):
                raise ValueError(
                    f"{kind}.pkl is a Git LFS pointer, not the file itself; run `git lfs pull` where it "
                    "comes from"
                )
            digest.update(block)
            size += len(block)
    return {"sha256": digest.hexdigest(), "size": size}


def _rules(files: _Source) -> bytes:
    with files.open(_RULES) as file:
        content = file.read(_LARGEST_RULES)
    try:
        rules = json.loads(content)
        for name, rule in rules.items():
            rule["obey"], name.split("_")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{_RULES} must give each rule its 'obey'; it does not ({error})") from error
    return content
