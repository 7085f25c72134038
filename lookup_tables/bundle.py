"""A folder that measures a table's models on another device, and the table that comes back from there.

What it holds: the models, ``manifest.json`` (what to measure in which order, the settings, and the sha256 of
every file) and ``measure.py``, which needs Python, numpy and onnxruntime. What comes back: ``results.jsonl``,
whose first line repeats the manifest, so that this file alone makes the table.
"""

from __future__ import annotations

import ast
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lookup_tables.build import check_networks
from lookup_tables.device import DeviceFingerprint
from lookup_tables.from_measurements import assemble_table, times_by_key
from lookup_tables.progress import Progress
from lookup_tables.runner import (
    BUNDLE_SCHEMA,
    MANIFEST,
    RESULTS,
    RUNNER,
    Results,
    manifest_text,
    read_manifest,
    to_profile,
)
from lookup_tables.session import SessionSettings
from lookup_tables.sources import (
    EntrySource,
    Method,
    Networks,
    SubnetSource,
    Which,
    by_key,
    export_models,
    put_together,
    to_measure,
)
from lookup_tables.table import LookupTable
from lookup_tables.whole_file import write_whole

# The runner and all that it is made of; a name stands in one of them only.
_RUNNER_MODULES = ("worker", "session", "device", "measure", "profiled", "runner")
_SHOWN = 3  # missing measurements that an error names

_HEAD = '''#!/usr/bin/env python3
"""Measures the models of this folder on this device:

    python3 measure.py

It needs Python 3.8 or newer, numpy and onnxruntime 1.18 or newer. Stop it when you like: the same command
goes on. Then, where hwnas is installed: hwnas table import FOLDER. This file was put together from the
modules of lookup_tables that its sections name; what they import of each other stands above them.
"""

from __future__ import annotations

import sys

try:
    import numpy
    import onnxruntime
except ImportError as error:
    sys.exit(f"error: {error}; install what is missing: {sys.executable} -m pip install numpy onnxruntime")

'''


def write_bundle(
    entries: Mapping[str, EntrySource],
    subnets: Sequence[SubnetSource],
    folder: str | Path,
    *,
    space: str,
    settings: SessionSettings,
    method: Method = "isolated",
    networks: Networks | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Writes what `build_table` would measure here, to be measured elsewhere.

    A folder that holds this very bundle is left as it is, with its results; one whose writing was cut off is
    completed.

    Args:
        entries, subnets, space, settings, method, networks, seed, progress: as for
            `lookup_tables.build_table`.
        folder: of the bundle.

    Raises:
        ValueError: no subnet, no networks to profile, a module that cannot be exported, or a folder that
            holds something else.
    """
    check_networks(subnets, method, networks, settings)
    folder = Path(folder)
    keyed = by_key(subnets)
    asked: dict[str, Any] = {
        "schema": BUNDLE_SCHEMA,
        "space": space,
        "method": method,
        "settings": settings.to_json(),
        "seed": seed,
        "entries": {key: source.name for key, source in entries.items()},
        "subnets": [{"key": key, "name": net.name, "parts": list(net.keys)} for key, net in keyed.items()],
    }
    wirings = networks.by_name() if method == "profiled" and networks is not None else {}
    if wirings:
        asked["networks"] = list(wirings)
    if (folder / MANIFEST).exists():
        there = read_manifest(folder)
        if {name: there.get(name) for name in asked} != asked:
            raise ValueError(f"'{folder}' holds another bundle; write into another folder, or move it away")
        return
    if folder.exists() and any(path.name not in (RUNNER, "models") for path in folder.iterdir()):
        raise ValueError(f"'{folder}' holds other files; write the bundle into a new folder")
    report = progress or (lambda what, done, total: None)
    whole = put_together(wirings, {} if networks is None else networks.parts, settings, report)
    calls = {name: [call.key for call in wirings[name].live()] for name in whole}
    profiled = {key for keys in calls.values() for key in keys}
    wanted = to_measure([key for key in entries if key not in profiled], keyed, seed, method)
    models, reference = export_models(wanted, entries, keyed, settings, report)
    files: dict[str, bytes] = {RUNNER: runner_script().encode()}

    def stored(model: bytes) -> str:
        name = f"models/{hashlib.sha256(model).hexdigest()[:16]}.onnx"
        files[name] = model  # a network's two turns are one file
        return name

    measure = [{"kind": kind, "key": key, "file": stored(models[kind, key])} for kind, key in wanted]
    manifest = {**asked, "measure": measure, "reference": stored(reference)}
    if whole:
        manifest["profile"] = [
            {"key": name, "file": stored(model), "calls": calls[name]} for name, model in whole.items()
        ]
    manifest["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in files.items():
        write_whole(folder / name, content)
    write_whole(folder / MANIFEST, manifest_text(manifest))


class OtherDevice(Protocol):
    """A device reached from here: by ssh (`lookup_tables.remote`) or adb (`lookup_tables.android`)."""

    @property
    def profiles(self) -> bool:
        """Whether it can time parts inside networks."""

    def measure(self, folder: Path, progress: Progress) -> None:
        """Measures what is missing of a bundle, and leaves ``results.jsonl`` in its folder."""

    def clean_up(self, folder: Path) -> None:
        """Removes what `measure` has left on the device."""


def build_table_on(
    device: OtherDevice,
    entries: Mapping[str, EntrySource],
    subnets: Sequence[SubnetSource],
    *,
    path: str | Path,
    space: str,
    settings: SessionSettings,
    method: Method = "isolated",
    networks: Networks | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LookupTable:
    """`lookup_tables.build_table` on another device: writes a bundle, has it measured there, takes it in.

    The bundle lies in ``<path>.bundle`` until the table is there; a build that was killed, here or there,
    goes on with what is measured. A finished table is returned as it is.

    Args:
        device: which measures.
        entries, subnets, path, space, settings, method, networks, seed, progress: as for
            `lookup_tables.build_table`.

    Raises:
        ValueError: as for `write_bundle`; the device cannot be reached or cannot measure; or there is a table
            at ``path`` that is not of these entries, space and settings.
    """
    path = Path(path)
    if path.exists():
        there = LookupTable.load(path)
        facts = there.space, there.settings, there.protocol["method"]
        if facts != (space, settings, method) or entries.keys() - there.entries.keys():
            raise ValueError(
                f"'{path}' holds a table of another space, method, other settings or fewer entries; build "
                "into another file, or move it away"
            )
        return there
    report = progress or (lambda what, done, total: None)
    folder = path.with_name(f"{path.name}.bundle")
    write_bundle(
        entries,
        subnets,
        folder,
        space=space,
        settings=settings,
        method=method,
        networks=networks,
        seed=seed,
        progress=report,
    )
    device.measure(folder, report)
    table = import_bundle(folder)
    table.save(path)
    device.clean_up(folder)
    shutil.rmtree(folder)
    return table


def import_bundle(path: str | Path) -> LookupTable:
    """The table that a bundle's results make, with its calibration and its held-out error.

    Args:
        path: the bundle's folder with ``results.jsonl`` in it, or that file alone.

    Raises:
        ValueError: the folder or the file is damaged, they do not belong together, or something has not been
            measured yet.
    """
    path = Path(path)
    results = Results(path / RESULTS if path.is_dir() else path)
    if not results.header:
        raise ValueError(
            f"nothing is measured in '{path}': run `python3 {RUNNER}` in the bundle's folder on the device, "
            f"and bring back the folder or its {RESULTS}"
        )
    manifest = results.header["manifest"]
    if path.is_dir() and read_manifest(path) != manifest:
        raise ValueError(
            f"'{results.path}' holds the results of another bundle; bring back those of this one"
        )
    if missing := [*results.missing(), *(f"profile {key}" for key in results.unprofiled())]:
        raise ValueError(
            f"{len(missing)} of {results.total} measurements are missing ("
            f"{', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''}): run `python3 {RUNNER}` "
            "in the bundle's folder on the device again, it goes on where it stopped; then import again"
        )
    found: dict[Which, Any] = {
        (item["kind"], item["key"]): results.found[f"{item['kind']} {item['key']}"]
        for item in manifest["measure"]
    }
    try:
        return assemble_table(
            found,
            manifest["entries"],
            {net["key"]: (net["name"], tuple(net["parts"])) for net in manifest["subnets"]},
            device=DeviceFingerprint.from_json(results.header["device"]),
            space=manifest["space"],
            settings=SessionSettings.from_json(manifest["settings"]),
            clock=results.header["clock"],
            method=manifest["method"],
            profiles={
                item["key"]: times_by_key(item["calls"], results.profiles[item["key"]])
                for item in to_profile(manifest)
            },
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the manifest in '{results.path}' is damaged: it lacks {error}; bundle and measure anew"
        ) from error


def runner_script() -> str:
    """``measure.py``: the runner and the modules that it needs, one after the other in one file."""
    imports: set[str] = set()
    sections: list[str] = []
    defined: dict[str, str] = {}
    for module in _RUNNER_MODULES:
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        lines = source.splitlines()
        docstring, *nodes = ast.parse(source).body
        lines[: docstring.end_lineno] = [""] * (docstring.end_lineno or 0)
        for node in nodes:
            text = ast.unparse(node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                start = "import" if isinstance(node, ast.Import) else f"from {node.module} import"
                if not start.startswith(("from lookup_tables", "from __future__")):
                    imports.update(f"{start} {ast.unparse(name)}" for name in node.names)
            elif not text.startswith(("if __name__", "if TYPE_CHECKING:\n    from lookup_tables")):
                for name in _names(node):
                    owner = defined.setdefault(name, module)
                    assert owner == module, f"'{name}' stands in {owner}.py and in {module}.py: rename one"
                continue
            first, last = node.lineno - 1, node.end_lineno or 0
            lines[first:last] = [""] * (last - first)
        sections.append(f"# ---- lookup_tables/{module}.py\n\n" + "\n".join(lines).strip())
    listed = "\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))
    return (
        f"{_HEAD}{listed}\n\n\n" + "\n\n\n".join(sections) + '\n\n\nif __name__ == "__main__":\n    main()\n'
    )


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
