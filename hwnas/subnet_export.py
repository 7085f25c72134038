"""From an architecture and a checkpoint on disk to a file that is deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from hwnas.certificate import (
    Certificate,
    check_parity,
    deployed_session,
    judged,
    now,
    patient_reading,
    runtime_facts,
)
from hwnas.data import describe, load_data, retrain_dataloader
from hwnas.engines import parity_report
from hwnas.export import accuracy, export_onnx, parity
from hwnas.loading import load_space
from hwnas.mobile import mobile_usability, quantise_on, to_ort
from hwnas.precision import int8_modules
from hwnas.recalibrate import recalibrate
from hwnas.run_folder import read_json
from hwnas.space import ModelSpace
from lookup_tables import LookupTable, fingerprint
from lookup_tables.session import Optimisation
from profilers import FlopsProfiler, LatencyProfiler, ParamsProfiler
from profilers.space import Architecture

_RECALIBRATION_BATCHES = 20


@final
@dataclass(frozen=True)
class Exported:
    """What was written, and what was found about it.

    Attributes:
        file: the one to deploy, of which all that follows is told.
        parity_max_abs_diff: largest difference between torch's outputs and the file's.
        test_accuracy: share of right answers of the file; None without data.
        engines: the largest difference between torch and other engines, or why there is none.
        mobile_usability: ONNX Runtime's report, for a file in its mobile format.
        certificate: for a budget.
    """

    file: Path
    parity_max_abs_diff: float
    test_accuracy: float | None
    engines: Mapping[str, float | str]
    mobile_usability: str | None
    certificate: Certificate | None


def export_from_checkpoint(
    architecture: Path,
    checkpoint: Path,
    out: Path,
    *,
    space: str,
    data: str | None = None,
    data_folder: str | None = None,
    input_shape: tuple[int, ...] = (1, 28, 28),
    num_classes: int = 10,
    dynamic_batch: bool = False,
    int8: bool = False,
    ort: bool = False,
    engines: Sequence[str] = (),
    max_latency_ms: float | None = None,
    device_table: Path | None = None,
    allow_other_device: bool = False,
    threads: int | None = None,
    optimisation: Optimisation | None = None,
    seed: int = 0,
) -> Exported:
    """Writes the file of an architecture with a checkpoint's weights, and says how it agrees with torch.

    All that is said is of the file that is written last: the INT8 one if that was asked, in ONNX Runtime's
    mobile format if that was.

    Args:
        architecture: a JSON file with one option for each choice.
        checkpoint: of Lightning or a plain state dict; of the subnet, or of the supernet, whose weights
            are inherited.
        out: the ONNX file.
        space: by name, or ``module:attribute``.
        data: recalibrates BatchNorm, gives real inputs to compare on, and tests the file; None: random
            inputs, and the checkpoint's BatchNorm statistics as they are.
        data_folder: where the data's files lie.
        input_shape, num_classes: where there is no data to say them.
        dynamic_batch: whether the batch stays open.
        int8: whether the file computes in INT8, its ranges found on images of the training split; so it does
            where the table is of INT8. Otherwise those modules do for which the architecture chose it
            (`hwnas.precision`).
        ort: whether there is a file in ONNX Runtime's mobile format, too: ``out`` with the suffix ``.ort``.
        engines: others that run the ONNX file and are compared with torch (`hwnas.engines`).
        max_latency_ms: the budget; the file is measured against it, and carries a certificate.
        device_table: a latency table, which says for the certificate what it predicts, and how the session
            is set up. It is of ONNX files: none is predicted for the mobile format.
        allow_other_device: whether that table may be of another device; the certificate then does not pass.
        threads, optimisation: of the session that is measured; None: those of the table, else 1 and ``all``.
        seed: of random inputs.

    Raises:
        ValueError: a damaged file, weights that fit neither the subnet nor the space or give no numbers, INT8
            without data, or a table without a budget, of other settings, or together with a mobile file.
    """
    table = None if device_table is None else LookupTable.load(device_table)
    session = deployed_session(table, threads, optimisation, None, int8)
    if table is not None and max_latency_ms is None:
        raise ValueError("a table predicts for a certificate: give a budget, too (--max-latency-ms)")
    if table is not None and ort:
        raise ValueError(
            "a table is of ONNX files, and says nothing about one in the mobile format: leave --device or "
            "--ort away"
        )
    module = None if data is None else load_data(data, folder=data_folder)
    if module is not None:
        module.prepare_data()
        module.setup("fit")
        facts = describe(module)
        input_shape, num_classes = facts.input_shape, facts.num_classes
    found = load_space(space, num_classes, input_shape[0])
    chosen = found.validate(read_json(architecture, "architecture"))
    quantised = [""] if session.precision == "int8" else int8_modules(found, chosen)
    if quantised != [""] and quantised and table is not None:
        raise ValueError(
            "this architecture computes in two precisions, and a table is of one: leave --device away"
        )
    if quantised and module is None:
        raise ValueError("INT8 needs real images for the ranges of its numbers: name them with --data")
    subnet = loaded_subnet(found, chosen, checkpoint).eval()
    inputs = torch.randn(8, *input_shape, generator=torch.Generator().manual_seed(seed))
    if module is not None:
        recalibrate(subnet, islice(retrain_dataloader(module), _RECALIBRATION_BATCHES))
        module.setup("test")
        inputs = next(iter(module.test_dataloader()))[0][:64]
    metadata = {"architecture": chosen, "space": space}
    export_onnx(subnet, inputs[:1], out, dynamic_batch=dynamic_batch, metadata=metadata)
    if module is not None and quantised:
        quantise_on(module, out, quantised)
    file = to_ort(out, out.with_suffix(".ort")) if ort else out
    differs = parity(subnet, file, [inputs], session.runtime)
    check_parity(differs, file, is_quantised=bool(quantised))
    accurate = None if module is None else accuracy(file, module.test_dataloader(), session.runtime)
    certificate = None
    if max_latency_ms is not None:
        session = dataclasses.replace(session, precision="int8" if quantised else "fp32")
        latency = None
        if table is not None:
            latency = LatencyProfiler(found, inputs[:1], table, allow_other_device=allow_other_device)
        reading = patient_reading(file, session)
        passed, reason = judged(reading, max_latency_ms, table)
        certificate = Certificate(
            passed=passed,
            valid=reading.valid,
            reason=reason,
            budget_ms=max_latency_ms,
            predicted_ms=None if latency is None else latency.profile(chosen),
            predicted_interval_ms=None if latency is None else latency.interval(chosen),
            measured_ms=reading.p10_ms,
            measured_p10_ms=reading.p10_ms,
            measured_median_ms=reading.median_ms,
            measured_p90_ms=reading.p90_ms,
            noise_floor_percent=reading.noise_floor_percent,
            clock=reading.clock,
            test_accuracy=accurate,
            parity_max_abs_diff=differs,
            macs=FlopsProfiler(found, inputs[:1]).profile(chosen),
            params=ParamsProfiler(found).profile(chosen),
            architecture=chosen,
            space=space,
            data=data or "random inputs",
            strategy="given",
            seed=seed,
            device=fingerprint(session.runtime).to_json(),
            runtime=runtime_facts(session),
            date=now(),
        )
        certificate.save(out, file.with_name(f"{file.name}.certificate.json"))
        if ort:  # the same graph again, now with the certificate
            to_ort(out, file)
    return Exported(
        file=file,
        parity_max_abs_diff=differs,
        test_accuracy=accurate,
        engines=parity_report(engines, subnet, out, inputs),
        mobile_usability=mobile_usability(out) if ort else None,
        certificate=certificate,
    )


def loaded_subnet(space: ModelSpace, architecture: Architecture, checkpoint: Path) -> nn.Module:
    """The subnet with a checkpoint's weights, wherever in the checkpoint its network stands.

    Raises:
        ValueError: the file is absent or damaged, its weights fit neither the subnet nor the space, or it
            holds several networks that fit, none of them as ``network``.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own
        raise ValueError(
            f"'{checkpoint}' is no checkpoint that torch can load: {_first_line(error)}"
        ) from error
    state: Mapping[str, Tensor] = content.get("state_dict", content) if isinstance(content, dict) else {}
    networks: list[nn.Module] = [space.freeze(architecture), space]
    misfit: RuntimeError | None = None
    for network in networks:
        weights = _of_network(state, set(network.state_dict()))
        if weights is not None:
            try:
                network.load_state_dict(weights)
            except RuntimeError as error:  # equal names, other shapes
                misfit = misfit or error
                continue
            return space.freeze(architecture) if network is space else network
    if misfit is not None:
        raise ValueError(
            f"the weights in '{checkpoint}' have other shapes than this architecture: {misfit}"
        ) from misfit
    raise ValueError(
        f"the weights in '{checkpoint}' fit neither the subnet of this architecture nor its space: give "
        "the architecture that they were trained for, and --space as in the search"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _of_network(state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor] | None:
    """The entries of one network in a state dict that may hold it under a prefix (``network.``).

    Raises:
        ValueError: it holds several under these names, none of them under the prefix of `Supervised`.
    """
    some_name = min(names)
    prefixes = [key.removesuffix(some_name) for key in state if key.endswith(some_name)]
    found = {
        prefix: {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
        for prefix in prefixes
    }
    fitting = {prefix: tensors for prefix, tensors in found.items() if set(tensors) == names}
    if len(fitting) > 1 and "network." not in fitting:
        raise ValueError(
            f"the checkpoint holds several networks with these names, under {sorted(fitting)}: save the "
            "state dict of the one that is meant (torch.save(module.net.state_dict(), path)) and give that"
        )
    return fitting.get("network.") or next(iter(fitting.values()), None)
