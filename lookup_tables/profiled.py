"""How long each part of whole networks takes while the others run around it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import onnx

from lookup_tables.assembly import owners
from lookup_tables.measure import Worker
from lookup_tables.session import SessionSettings

# By the place of the part's call in the network: microseconds of one run, in each session.
PartTimes = dict[int, tuple[float, ...]]

_CHUNK = 24  # networks a worker process
_SESSIONS = 3  # a network
_RUNS = 30  # a session, under the profiler
_SAMPLES = 5  # a session, without it


class Profile(Protocol):
    """`profile`, or a stand-in for it."""

    def __call__(
        self,
        networks: Mapping[str, bytes],
        settings: SessionSettings,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_result: Callable[[str, PartTimes], None] | None = None,
    ) -> dict[str, PartTimes]: ...


def profile(
    networks: Mapping[str, bytes],
    settings: SessionSettings,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    on_result: Callable[[str, PartTimes], None] | None = None,
) -> dict[str, PartTimes]:
    """Times the parts of assembled networks by ONNX Runtime's own profiler, in worker processes.

    Each network has three sessions of 30 runs, at three times: in each round every network of a worker has
    one, in a new order. A part's time in a session is the mean of its runs from the 10th to the 50th
    percentile: the profiler's clock is the wall's, and where another program had the core or the cache a run
    takes longer. What the profiler itself adds to a node, 4 to 5 us, is known from the same sessions, which
    go on without it, and is taken off: the parts of a network then take together what the network does.

    Args:
        networks: models of `lookup_tables.assembly.assembled`, by any key.
        settings: of the sessions.
        seed: of the order and of the random inputs.
        progress: told how many networks are done, and how many there are.
        on_result: called with each key and its times as soon as its worker has finished.

    Returns:
        For each network, each part that has a node of its own left: what a runtime fuses into another part's
        node has none.

    Raises:
        ValueError: ONNX Runtime cannot run a network, which is named.
        RuntimeError: a worker died; the network that it was at is named.
    """
    results: dict[str, PartTimes] = {}
    keys = list(networks)
    for first in range(0, len(keys), _CHUNK):
        chunk = keys[first : first + _CHUNK]
        generator = random.Random(f"{seed} {first}")
        sessions: dict[str, list[_Session]] = {key: [] for key in chunk}
        with tempfile.TemporaryDirectory(prefix="lookup_tables-") as folder, Worker(settings, seed) as worker:
            optimised = Path(folder, "optimised.onnx")
            paths = {key: Path(folder, f"{place}.onnx") for place, key in enumerate(chunk)}
            for key, path in paths.items():
                path.write_bytes(networks[key])
            belongs: dict[str, dict[str, int]] = {}
            for done in range(1, _SESSIONS + 1):
                for key in generator.sample(chunk, len(chunk)):
                    nodes, whole = worker.node_times(
                        paths[key], f"network '{key}'", _RUNS, _SAMPLES, optimised
                    )
                    if key not in belongs:
                        belongs[key] = owners(onnx.load(str(optimised)))
                    sessions[key].append(_session(nodes, whole, belongs[key]))
                if progress is not None:
                    progress(first + len(chunk) * done // _SESSIONS, len(keys))
        each = float(np.median([session.added_us() for found in sessions.values() for session in found]))
        for key, found in sessions.items():
            results[key] = {
                part: tuple(max(session.us[part] - each * session.nodes[part], 0.0) for session in found)
                for part in found[0].us
            }
            if on_result is not None:
                on_result(key, results[key])
    return results


@final
@dataclass(frozen=True)
class _Session:
    """What one session saw.

    Attributes:
        us: microseconds of each part's nodes under the profiler.
        nodes: how many each part has.
        whole_us: of the network without the profiler.
    """

    us: dict[int, float]
    nodes: dict[int, int]
    whole_us: float

    def added_us(self) -> float:
        """What the profiler adds to a node."""
        return (sum(self.us.values()) - self.whole_us) / sum(self.nodes.values())


def _session(nodes: Mapping[str, list[float]], whole: list[float], belongs: Mapping[str, int]) -> _Session:
    by_part: dict[int, list[list[float]]] = {}
    for name, times in nodes.items():
        by_part.setdefault(belongs[name], []).append(times)
    return _Session(
        us={part: _undisturbed(np.sum(times, axis=0)) for part, times in by_part.items()},
        nodes={part: len(times) for part, times in by_part.items()},
        whole_us=min(whole),
    )


def _undisturbed(runs: npt.NDArray[np.float64]) -> float:
    ordered = np.sort(runs)
    return float(ordered[len(ordered) // 10 : max(len(ordered) // 2, 1)].mean())
