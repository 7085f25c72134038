"""Hardware-aware neural architecture search on PyTorch and Lightning."""

from hwnas.cell import Cell
from hwnas.choices import ChosenInputs, InputChoice, LayerChoice, Repeat
from hwnas.gate import Gate
from hwnas.space import ModelSpace, keep_gates
from hwnas.values import ValueChoice, case, condition, maximum, minimum, to_float, to_int

__all__ = [
    "Cell",
    "ChosenInputs",
    "Gate",
    "InputChoice",
    "LayerChoice",
    "ModelSpace",
    "Repeat",
    "ValueChoice",
    "case",
    "condition",
    "keep_gates",
    "maximum",
    "minimum",
    "to_float",
    "to_int",
]
