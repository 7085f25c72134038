"""A call that can be written down: what to import, and its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from hwnas.loading import imported
from hwnas.values import Value, ValueChoice
from profilers.space import Option


@final
@dataclass(frozen=True, eq=False)
class Call:
    """A call as plain data: it survives JSON, goes to another machine, and is made there.

    Arguments are numbers, strings, booleans, None; lists, tuples and dictionaries of those; other calls,
    which are made first, so that what they return is the argument; and `ValueChoice`s with a label, which
    an architecture decides (`under`). Tuples come back from JSON as tuples.

    Args:
        target: ``module:attribute``, a class or a function; modules in the working directory are found.
        arguments: its keywords.

    Raises:
        ValueError: the target is not of that form.
        TypeError: an argument that cannot be written down, or a `ValueChoice` without a label.

    >>> layer = Call("torch.nn:Linear", {"in_features": 3, "out_features": 2})
    >>> layer()
    Linear(in_features=3, out_features=2, bias=True)
    >>> Call.from_json(layer.to_json()) == layer
    True
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"a Call names its target as module:attribute; got {self.target!r}")
        object.__setattr__(self, "arguments", dict(self.arguments))
        self.to_json()  # says what cannot be written down, while it is known where that came from

    def __call__(self, *given: Any, **more: Any) -> Any:
        """Imports the target and calls it with ``given``, the arguments, and ``more``.

        Raises:
            ValueError: the target cannot be imported, or a `ValueChoice` among the arguments is undecided.
        """
        return imported(self.target, "call")(*given, **_mapped(self.arguments, _made), **more)

    @property
    def __signature__(self) -> inspect.Signature:
        """The target's, for `inspect.signature`."""
        return inspect.signature(imported(self.target, "call"))

    def choices(self) -> list[ValueChoice]:
        """The `ValueChoice`s among the arguments, those of inner calls included."""
        return list(_choices(self.arguments))

    def under(self, architecture: Mapping[str, Option]) -> Call:
        """The call with what an architecture decides where `ValueChoice`s stood."""

        def decided(leaf: Any) -> Any:
            if isinstance(leaf, ValueChoice):
                return leaf.of(architecture)
            return leaf.under(architecture) if isinstance(leaf, Call) else leaf

        return Call(self.target, _mapped(self.arguments, decided))

    def to_json(self) -> dict[str, Any]:
        arguments = {name: _encoded(held, f"'{name}'") for name, held in self.arguments.items()}
        return {"call": self.target, "arguments": arguments}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Call:
        """Raises ``ValueError`` where the data is no call."""
        if data.keys() != {"call", "arguments"}:
            raise ValueError(f"a call has 'call' and 'arguments'; got {list(data)}")
        return cls(data["call"], {name: _decoded(held) for name, held in data["arguments"].items()})

    def __eq__(self, other: object) -> bool:
        # Comparing choices makes a value that is read in `forward`; their written form is plain.
        return isinstance(other, Call) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.target, *self.arguments))


def _choices(thing: Any) -> Iterator[ValueChoice]:
    if isinstance(thing, ValueChoice):
        yield thing
    elif isinstance(thing, Call):
        yield from thing.choices()
    elif isinstance(thing, list | tuple | dict):
        for item in thing.values() if isinstance(thing, dict) else thing:
            yield from _choices(item)


def _made(leaf: Any) -> Any:
    if isinstance(leaf, ValueChoice):
        raise ValueError(f"{leaf} is not decided yet: call.under(architecture) says which option it is")
    return leaf() if isinstance(leaf, Call) else leaf


def _mapped(thing: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of nested containers, with ``function`` of everything that is no container."""
    if isinstance(thing, dict):
        return {name: _mapped(item, function) for name, item in thing.items()}
    if isinstance(thing, list):
        return [_mapped(item, function) for item in thing]
    if isinstance(thing, tuple):
        return tuple(_mapped(item, function) for item in thing)
    return function(thing)


# What JSON has no form for is a dictionary of exactly these keys.
_MARKS = ({"call", "arguments"}, {"choose", "label"}, {"tuple"})


def _encoded(thing: Any, place: str) -> Any:
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, list):
        return [_encoded(item, f"{place}[{index}]") for index, item in enumerate(thing)]
    if isinstance(thing, tuple):
        return {"tuple": _encoded(list(thing), place)}
    if isinstance(thing, dict):
        if thing.keys() in _MARKS or not all(isinstance(key, str) for key in thing):
            raise TypeError(
                f"a dictionary among a Call's arguments has strings as keys, and not exactly the keys "
                f"{' or '.join(str(sorted(keys)) for keys in _MARKS)}; got {list(thing)} at {place}"
            )
        return {key: _encoded(item, f"{place}[{key!r}]") for key, item in thing.items()}
    if isinstance(thing, Call):
        return thing.to_json()
    if isinstance(thing, ValueChoice) and thing.label is not None:
        return {"choose": _encoded(list(thing.options), place), "label": thing.label}
    if isinstance(thing, Value):
        raise TypeError(
            f"a choice among a Call's arguments is a ValueChoice with a label; got {thing!r} at {place}. "
            "Give it a label, and leave arithmetic to what is called"
        )
    raise TypeError(
        "a Call's arguments are numbers, strings, None, lists, tuples, dictionaries, Calls and "
        f"ValueChoices; got {type(thing).__name__} at {place}. Give a Call that makes it"
    )


def _decoded(thing: Any) -> Any:
    if isinstance(thing, list):
        return [_decoded(item) for item in thing]
    if not isinstance(thing, dict):
        return thing
    if thing.keys() == {"tuple"}:
        return tuple(map(_decoded, thing["tuple"]))
    if thing.keys() == {"choose", "label"}:
        return ValueChoice(map(_decoded, thing["choose"]), thing["label"])
    if thing.keys() == {"call", "arguments"}:
        return Call.from_json(thing)
    return {key: _decoded(item) for key, item in thing.items()}
