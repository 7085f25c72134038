"""ENAS's spaces in the sizes that are asked for."""

from __future__ import annotations

from typing import Any

from hwnas import ModelSpace
from hwnas.data import DataFacts
from hwnas.spaces import ENASMacro, ENASMicro

SMALL = {"macro": {"channels": 16, "layers": 6}, "micro": {"channels": 8, "cells": 3, "nodes": 3}}


def make_space(
    name: str,
    facts: DataFacts,
    channels: int | None,
    depth: int | None,
    nodes: int | None,
    **arguments: Any,
) -> ModelSpace:
    """``"macro"`` or ``"micro"``; a size that is None is the small variant's."""
    make, length = (ENASMacro, "layers") if name == "macro" else (ENASMicro, "cells")
    asked = {"channels": channels, length: depth, **({} if name == "macro" else {"nodes": nodes})}
    sizes = SMALL[name] | {key: value for key, value in asked.items() if value is not None}
    return ModelSpace(make(facts.num_classes, facts.input_shape[0], **sizes, **arguments))
