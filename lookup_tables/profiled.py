"""How long each part of whole networks takes while the others run around it.

This file goes into bundles, as `lookup_tables.measure` does: it runs on Python 3.8 and needs numpy alone.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, final

import numpy as np

from lookup_tables.measure import Worker
from lookup_tables.session import SessionSettings

if TYPE_CHECKING:
    import numpy.typing as npt

    # By the place of the part's call in the network: microseconds of one run, in each session.
    PartTimes = dict[int, tuple[float, ...]]

_NETWORKS = 24  # a worker process
_SESSIONS = 3  # a network
_RUNS = 30  # a session, under the profiler
_WITHOUT = 5  # samples of a session without it
_OWNER = re.compile(r"p(\d+)\.")


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
    opening: Callable[[], AbstractContextManager[Worker]] | None = None,
) -> dict[str, PartTimes]:
    """Times the parts of assembled networks by ONNX Runtime's own profiler, in worker processes.

    Each network has three sessions of 30 runs, at three times: in each round every network of a worker has
    one, in a new order. A part's time in a session is the mean of its runs from the 10th to the 30th
    percentile: the profiler's clock is the wall's, and where another program had the core or the cache a run
    takes longer. What the profiler itself adds to a node, 4 to 7 us, is known from the same session, which
    goes on without it, and is taken off: the parts of a network then take together what the network does.
    It differs from one session to the next (with one number for all, networks of 20 to 150 us were predicted
    with twice the error), but what a disturbed session tells of it is wrong by more than they differ, so it
    is kept between the quartiles of the worker's sessions.

    Args:
        networks: models of `lookup_tables.assembly.assembled`, by any key.
        settings: of the sessions.
        seed: of the order and of the random inputs.
        progress: told how many networks are done, and how many there are.
        on_result: called with each key and its times as soon as its worker has finished.
        opening: starts a worker, in place of our own.

    Returns:
        For each network, each part that has a node of its own left: what a runtime fuses into another part's
        node has none.

    Raises:
        ValueError: ONNX Runtime cannot run a network, which is named.
        RuntimeError: a worker died; the network that it was at is named.
    """
    results: dict[str, PartTimes] = {}
    keys = list(networks)
    for first in range(0, len(keys), _NETWORKS):
        chunk = keys[first : first + _NETWORKS]
        generator = random.Random(f"{seed} {first}")
        sessions: dict[str, list[_Session]] = {key: [] for key in chunk}
        scratch = tempfile.TemporaryDirectory(prefix="lookup_tables-")
        with scratch as folder, (opening or partial(Worker, settings, seed))() as worker:
            optimised = Path(folder, "optimised.onnx")
            paths = {key: Path(folder, f"{place}.onnx") for place, key in enumerate(chunk)}
            for key, path in paths.items():
                path.write_bytes(networks[key])
            belongs: dict[str, dict[str, int]] = {}
            for done in range(1, _SESSIONS + 1):
                for key in generator.sample(chunk, len(chunk)):
                    nodes, whole = worker.node_times(
                        paths[key], f"network '{key}'", _RUNS, _WITHOUT, optimised
                    )
                    if key not in belongs:
                        belongs[key] = owners(as_profiled(nodes_of(optimised.read_bytes()), list(nodes)))
                    sessions[key].append(_session(nodes, whole, belongs[key]))
                if progress is not None:
                    progress(first + len(chunk) * done // _SESSIONS, len(keys))
        least, most = np.percentile([s.added_us for found in sessions.values() for s in found], (25, 75))
        for key, found in sessions.items():
            results[key] = {
                part: tuple(s.alone_us(part, float(np.clip(s.added_us, least, most))) for s in found)
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

    @property
    def added_us(self) -> float:
        """What the profiler adds to a node, as far as this session tells."""
        return (sum(self.us.values()) - self.whole_us) / sum(self.nodes.values())

    def alone_us(self, part: int, added_us: float) -> float:
        """Of a part, without what the profiler adds to each node."""
        return max(self.us[part] - added_us * self.nodes[part], 0.0)


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
    return float(ordered[len(ordered) // 10 : max(3 * len(ordered) // 10, 1)].mean())


@final
@dataclass(frozen=True)
class Node:
    """What a node of an ONNX model is called, which operator it is, what it reads and makes."""

    name: str
    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]


def owners(nodes: Sequence[Node]) -> dict[str, int]:
    """Which call each node of an assembled network belongs to, after a runtime has rewritten it.

    A fused node keeps the name of the node that does its work (ONNX Runtime: a convolution with what was
    added to it keeps the convolution's), so the name decides first. A node that the runtime put between (a
    reorder of the layout) belongs to the part whose tensor it makes; if that has no owner either, to who
    reads it; and at last to who feeds it.
    """
    found = {n.name: owner for n in nodes if (owner := _owner((n.name, *n.outputs))) is not None}
    made_by = {name: node.name for node in nodes for name in node.outputs}
    for node in reversed(nodes):
        readers = (other.name for other in nodes if set(other.inputs) & set(node.outputs))
        known = [found[name] for name in readers if name in found]
        if node.name not in found and known:
            found[node.name] = min(known)
    for node in nodes:
        known = [found[made_by[name]] for name in node.inputs if made_by.get(name) in found]
        if node.name not in found and known:
            found[node.name] = max(known)
    return found


def _owner(names: Sequence[str]) -> int | None:
    matches = (_OWNER.search(name) for name in names)
    return next((int(match.group(1)) for match in matches if match), None)


def nodes_of(model: bytes) -> list[Node]:
    """The nodes of an ONNX file, read from its bytes: a device that measures has no onnx.

    By protobuf's encoding, and the numbers of the fields in onnx/onnx, onnx/onnx.proto: a model's graph is
    7, a graph's node 1, a node's input 1, output 2, name 3 and operator 4.
    """
    graphs = [graph for number, graph in _fields(memoryview(model)) if number == 7]
    nodes = []
    for content in (content for graph in graphs for number, content in _fields(graph) if number == 1):
        found: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
        for number, text in _fields(content):
            if number in found:
                found[number].append(bytes(text).decode())
        nodes.append(Node("".join(found[3]), "".join(found[4]), found[1], found[2]))
    return nodes


def as_profiled(nodes: Sequence[Node], ran: Sequence[str]) -> list[Node]:
    """The nodes by the names that the profiler gave them.

    A node without a name is called by its operator and a number there: those of a function that ONNX Runtime
    takes apart (HardSwish behind a matrix product) have none.

    Args:
        nodes: of the optimised model, as they run one after the other.
        ran: the profiler's names, in the same order.

    Raises:
        RuntimeError: the two do not fit together.
    """
    known = {node.name for node in nodes if node.name}
    others = iter([name for name in ran if name not in known])
    named = [node if node.name else replace(node, name=next(others, "")) for node in nodes]
    wrong = [node for node in named if node.name not in known and node.name.rpartition("_")[0] != node.op]
    if wrong or next(others, None) is not None:
        raise RuntimeError(
            f"ONNX Runtime profiled the nodes {list(ran)}, its optimised model has "
            f"{[node.name for node in nodes]}: measure by another method than `profiled`, and report it "
            "with both"
        )
    return named


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a protobuf message that hold bytes, text or a message, by number."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A whole number, seven bits a byte from the lowest on, and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
