"""How the runtime is set up: a time holds for these settings only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import onnxruntime

from lookup_tables.worker import LEVELS, session_options

Optimisation = Literal["all", "extended", "basic", "disabled"]
Runtime = Literal["onnxruntime", "openvino"]
Precision = Literal["fp32", "int8"]

RUNTIMES = get_args(Runtime)
PRECISIONS = get_args(Precision)
# What tables and certificates of earlier versions, which do not say it, were measured with.
_FORMERLY = {"runtime": "onnxruntime", "precision": "fp32"}


@final
@dataclass(frozen=True)
class SessionSettings:
    """The deployed settings of a session on the CPU.

    The optimisation level must be the deployed one: "all" is 2.2 to 8 times as fast as "extended" on some
    CPUs, and not by the same factor for every block. So must the precision: INT8 is 0.5 times to 3 times
    the time of fp32, by operator, and is measured, never scaled.

    Args:
        threads: threads inside an operator.
        optimisation: ONNX Runtime's level of graph optimisation. OpenVINO has no levels: it is "all" there.
        runtime: what runs the file.
        precision: what the file computes in. "int8" is the static quantisation of `lookup_tables.quantise`:
            modules that are exported to be measured are quantised so, a file that is given is as it is.

    Raises:
        ValueError: ``threads`` is not a positive integer, or another setting is unknown.

    >>> SessionSettings(threads=1).clock, SessionSettings(threads=2).clock
    ('thread_cpu', 'wall')
    """

    threads: int = 1
    optimisation: Optimisation = "all"
    runtime: Runtime = "onnxruntime"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1:
            raise ValueError(f"threads must be a positive integer, got {self.threads!r}")
        for what, given, known in (
            ("optimisation", self.optimisation, tuple(LEVELS)),
            ("runtime", self.runtime, RUNTIMES),
            ("precision", self.precision, PRECISIONS),
        ):
            if given not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}; got {given!r}")
        if self.runtime == "openvino" and self.optimisation != "all":
            raise ValueError(
                f"OpenVINO has no levels of optimisation: it must be 'all', got {self.optimisation!r}"
            )

    @property
    def clock(self) -> Literal["thread_cpu", "wall"]:
        """CPU time of the calling thread at one thread, which a busy machine hardly moves; else wall time.

        Both runtimes do the work of a synchronous call at one thread in the thread that calls.
        """
        return "thread_cpu" if self.threads == 1 else "wall"

    def options(self) -> onnxruntime.SessionOptions:
        """Fresh options: one operator after another, waiting threads asleep, only errors logged."""
        return session_options(self.threads, self.optimisation)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> SessionSettings:
        """Reads what `to_json` wrote; without a runtime it is ONNX Runtime, without a precision fp32.

        Raises:
            ValueError: a setting is missing, unknown or invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        facts = {**_FORMERLY, **facts}
        if facts.keys() != names:
            raise ValueError(
                f"session settings must hold exactly {', '.join(sorted(names))}; "
                f"got {', '.join(sorted(facts)) or 'nothing'}"
            )
        return cls(**facts)
