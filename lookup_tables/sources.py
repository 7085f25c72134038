"""What a table is made of: parts, whole networks, and the models that are measured for them."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from lookup_tables.assembly import Wiring, assembled
from lookup_tables.export import to_onnx
from lookup_tables.graph import executed_graph
from lookup_tables.progress import Progress, step
from lookup_tables.quantise import quantise_untrained
from lookup_tables.session import SessionSettings
from lookup_tables.slope import COPIES, chains

Method = Literal["isolated", "slope", "profiled"]
Which = tuple[str, str]  # what a measurement is of: its kind, and a key

OVERHEAD = ("overhead", "empty model")  # what a session costs that does nothing: every entry holds it once
TURNS = ("subnet 1", "subnet 2")
CHAINS = ("one copy", f"{COPIES} copies")


@final
@dataclass(frozen=True)
class EntrySource:
    """A part to measure: a plain module on the ``meta`` device with its inputs."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class SubnetSource:
    """A whole network to measure, with the keys of the entries that it executes, as often as it does."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    keys: tuple[str, ...]


@final
@dataclass(frozen=True)
class Networks:
    """Whole networks to profile.

    Attributes:
        wirings: what each runs; best such that every entry is in three of them or more.
        parts: everything that they run, by key, also what costs nothing.
    """

    wirings: tuple[Wiring, ...]
    parts: Mapping[str, EntrySource]

    def by_name(self) -> dict[str, Wiring]:
        """Each network by a digest of what it runs."""
        return {hashlib.sha256(repr(wiring).encode()).hexdigest()[:20]: wiring for wiring in self.wirings}


def by_key(subnets: Sequence[SubnetSource]) -> dict[str, SubnetSource]:
    """Each network once, by the digest of what it executes."""
    return {executed_graph(net.module, net.inputs).key: net for net in subnets}


def to_measure(
    entries: Iterable[str], subnets: Iterable[str], seed: int, method: Method = "isolated"
) -> list[Which]:
    """What a table is made of, by the keys of its parts and networks, in the order of measuring.

    A machine drifts over minutes: parts, networks and the networks' second turn are mixed, so that they meet
    the same weather, and drift is noise and not a bias of one against the other.
    """
    kinds = CHAINS if method == "slope" else ("entry",)
    wanted = [OVERHEAD, *((kind, key) for key in entries for kind in kinds)]
    wanted += [(turn, key) for key in subnets for turn in TURNS]
    random.Random(seed).shuffle(wanted)
    return wanted


def export_models(
    wanted: Iterable[Which],
    entries: Mapping[str, EntrySource],
    subnets: Mapping[str, SubnetSource],
    settings: SessionSettings,
    report: Progress,
) -> tuple[dict[Which, bytes], bytes]:
    """The model of each measurement, and one of middling size to look at between them."""
    wanted = list(wanted)
    parts = {key: entries[key] for kind, key in wanted if kind in ("entry", *CHAINS)}
    has_chains = any(kind in CHAINS for kind, _ in wanted)
    # One at least, to look at between others.
    nets = {key: subnets[key] for kind, key in wanted if kind in TURNS} or dict([*subnets.items()][:1])
    whole = exported(nets, settings, "exporting networks", report)
    blocks = exported(parts, settings, "exporting blocks", report)
    models = {OVERHEAD: _empty_model()}
    for key, model in blocks.items():
        models["entry", key] = model
        if has_chains:
            models |= {(kind, key): chain for kind, chain in zip(CHAINS, chains(model), strict=True)}
    models |= {(turn, key): model for key, model in whole.items() for turn in TURNS}
    return {which: models[which] for which in wanted}, _middle(whole)


def _middle(models: Mapping[str, bytes]) -> bytes:
    """A model of middling size, to look at between others."""
    return sorted(models.values(), key=len)[len(models) // 2]


def _empty_model() -> bytes:
    """A model that does as good as nothing."""
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")
    )
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "empty", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def exported(
    sources: Mapping[str, EntrySource] | Mapping[str, SubnetSource],
    settings: SessionSettings,
    what: str,
    report: Progress,
) -> dict[str, bytes]:
    if not sources:
        return {}
    modules = {key: (source.module, source.inputs) for key, source in sources.items()}
    models = to_onnx(modules, progress=step(report, what))
    if settings.precision == "fp32":
        return models
    return {key: quantise_untrained(model) for key, model in models.items()}


def put_together(
    wirings: Mapping[str, Wiring],
    parts: Mapping[str, EntrySource],
    settings: SessionSettings,
    report: Progress,
) -> dict[str, bytes]:
    """The models of networks whose parts can be told apart in them, without those that cannot be made."""
    keys = {call.key for wiring in wirings.values() for call in wiring.live()}
    models = exported({key: parts[key] for key in sorted(keys)}, settings, "exporting blocks", report)
    made = {}
    for name, wiring in wirings.items():
        # What is in no network that can be put together is measured alone.
        with contextlib.suppress(ValueError):
            made[name] = assembled(wiring, models)
    return made
