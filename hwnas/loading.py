"""What ``my_module:my_object`` stands for, and the ready-made spaces by name."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn

from hwnas.space import ModelSpace
from hwnas.spaces import SPACES

_SMALL = ":small"


def imported(name: str, what: str) -> Any:
    """The object at ``module:attribute``; modules in the working directory are found.

    Raises:
        ValueError: an import that fails, or no such attribute.
    """
    module, _, attribute = name.partition(":")
    # The console script has its own folder in front, not the working directory.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} {name!r} cannot be imported from {os.getcwd()}: {error}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ValueError(f"{what} {name!r}: {module!r} ({found}) has no {part!r}") from None
    return found


def load_space(name: str, num_classes: int, in_channels: int) -> ModelSpace:
    """A ready-made space by its name, in its small size by ``name:small``, or ``module:attribute``.

    The attribute is a class or function that is called with ``num_classes`` and ``in_channels`` and
    returns a network with choices, or a `ModelSpace`.

    Raises:
        ValueError: an unknown name, an import that fails, or no choice in the network.
        TypeError: what is made is no module.
    """
    if name in SPACES:
        make: Any = SPACES[name]
    elif (ready := name.removesuffix(_SMALL)) in SPACES:
        make = SPACES[ready].small
    elif ":" in name:
        make = imported(name, "space")
    else:
        raise ValueError(
            f"unknown space {name!r}; there are {', '.join(SPACES)} (each also as NAME{_SMALL}, for "
            "images of 28x28 to 32x32), and my_module:MyNetwork for any module with choices that takes "
            "num_classes and in_channels"
        )
    try:
        network = make(num_classes=num_classes, in_channels=in_channels)
    except TypeError as error:
        raise TypeError(
            f"space {name!r} must be a class or function that takes num_classes and in_channels; called with "
            f"num_classes={num_classes}, in_channels={in_channels} it says: {error}"
        ) from error
    if isinstance(network, ModelSpace):
        return network
    if not isinstance(network, nn.Module):
        raise TypeError(f"space {name!r} must make a torch.nn.Module; it made a {type(network).__name__}")
    return ModelSpace(network)
