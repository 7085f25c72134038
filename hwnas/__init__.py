"""Hardware-aware neural architecture search on PyTorch and Lightning."""

from hwnas.choices import ChosenInputs, InputChoice, LayerChoice, Repeat
from hwnas.gate import Gate
from hwnas.space import ModelSpace, keep_gates
from hwnas.values import ValueChoice

__all__ = [
    "ChosenInputs",
    "Gate",
    "InputChoice",
    "LayerChoice",
    "ModelSpace",
    "Repeat",
    "ValueChoice",
    "keep_gates",
]
