"""`Cell`: a small graph whose edges and operations are searched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from hwnas.choices import BranchCall, Branching, Condition, LayerChoice, reduce_inputs, run_child
from hwnas.fold import Fold
from hwnas.freezing import Freezer
from hwnas.gate import mixture
from hwnas.values import (
    Combination,
    Expression,
    Value,
    ValueChoice,
    combinations,
    described,
    named,
    weights_of,
)
from profilers.space import Option

OpFactory = Callable[[int, int, int], nn.Module]
"""``(node, 0, source)`` to one candidate of the edge from ``source`` to ``node``."""

Edges = Literal["learned", "strongest"]

NONE = "none"
"""The candidate that is no operation, as DARTS names it: an edge is never kept for its sake."""

_LEAST = 1e-30  # a probability that has rounded to 0 keeps a logarithm


@final
class Cell(nn.Module):
    """A graph of a few nodes, each the sum of operations on the outputs of earlier ones (arXiv 1707.07012).

    States are numbered: the cell's inputs are ``0 … num_predecessors - 1``, its nodes follow. Each node
    chooses ``num_ops_per_node`` different states before it (all of them, where there are no more), and for
    each edge that it chooses one of the candidates. The choice of a candidate takes no part where its edge
    is not chosen; such an edge runs nothing and is not in the subnet. ``ModelSpace.options`` has
    ``"label.node.inputs"``, whose options are the tuples of states (not where a node takes all of them), and
    ``"label.node.state"``, whose options are the candidates.

    Shapes: tensors ``(N, C, …)``, one for each predecessor, as arguments or in a list, to one tensor
    ``(N, C * n_outputs, …)``. Candidates on the edges into one node return equal shapes.

    Under mixing weights a node is the sum over its edges of ``P(edge is chosen) * mixture of its
    candidates``: the expectation of the node given the states before it. That is ``edges="learned"``.

    With ``edges="strongest"`` the edges have no probabilities of their own, as in DARTS (arXiv 1806.09055,
    section 2.4): a search that mixes runs every edge with weight 1, and what is derived keeps the edges
    with the strongest operations. The strength of an edge is the largest probability among its candidates
    that are not named ``"none"``; ``"none"`` itself is derived only where a budget leaves nothing else.
    Departure: the derivation maximises the product of the probabilities of the operations that are kept,
    which is the authors' cell where there is no budget, and exact under one (`hwnas.derive`). A penalty
    sees the edges with probabilities in proportion to the products of their strengths. Strategies that run
    one path draw edges as in any other choice.

    Candidates and arguments are those of NNI's ``Cell``, with these differences: a node never takes one
    state twice; two operations a node are the default; an edge's candidates do not depend on the how-manieth
    operation of its node it is.

    Args:
        op_candidates: in a list (options are indices) or in a dictionary (options are names). Each is a
            function ``(node, 0, source)`` that makes a module, called once for each edge; or a module,
            which is copied for each edge, weights included.
        num_nodes: how many nodes.
        num_ops_per_node: how many states each node takes.
        num_predecessors: how many inputs the cell has.
        merge_op: ``"all"`` concatenates all nodes; ``"loose_end"`` those that no node takes (arXiv
            1905.13214). The width then depends on the edges, see `n_outputs`, and such a cell stands before
            an operation of `hwnas.nn` that takes it. Under mixing weights each place of the concatenation is
            the mixture of the nodes that may stand there; not with ``edges="strongest"``.
            Costs are exact for any number of nodes where its width meets none of its own choices: bring the
            inputs of a cell behind it, if that has equal labels, to a fixed width first (as DARTS does).
        preprocessor: what happens to the list of inputs first; a module or function that returns a list.
        postprocessor: ``(output, inputs of the cell)`` to what the cell returns.
        concat_dim: along which dimension nodes are concatenated.
        label: cells with equal labels are one decision. Without one, the choices are named after their
            place.
        edges: ``"learned"`` or ``"strongest"``.

    Attributes:
        n_outputs: how many nodes are concatenated: a value that follows the edges under ``"loose_end"``.

    Raises:
        ValueError: counts below 1, no candidates, or an unknown option.

    >>> from hwnas import ModelSpace
    >>> ops = {"conv": lambda node, _, source: nn.Conv2d(8, 8, 3, padding=1), "skip": nn.Identity()}
    >>> space = ModelSpace(Cell(ops, num_nodes=2, num_predecessors=2, label="cell"))
    >>> space.options["cell.3.inputs"], space(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)).shape
    (((0, 1), (0, 2), (1, 2)), torch.Size([1, 16, 4, 4]))
    """

    def __init__(
        self,
        op_candidates: Sequence[nn.Module | OpFactory] | Mapping[str, nn.Module | OpFactory],
        num_nodes: int,
        num_ops_per_node: int = 2,
        num_predecessors: int = 1,
        merge_op: Literal["all", "loose_end"] = "all",
        preprocessor: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
        postprocessor: Callable[[Tensor, list[Tensor]], Any] | None = None,
        concat_dim: int = 1,
        label: str | None = None,
        edges: Edges = "learned",
    ) -> None:
        super().__init__()
        if min(num_nodes, num_ops_per_node, num_predecessors) < 1:
            raise ValueError(
                f"{described('Cell', label)} needs at least one node, one operation a node and one "
                f"predecessor; got num_nodes={num_nodes}, num_ops_per_node={num_ops_per_node}, "
                f"num_predecessors={num_predecessors}"
            )
        if merge_op not in ("all", "loose_end") or edges not in ("learned", "strongest"):
            raise ValueError(
                f"{described('Cell', label)} takes merge_op 'all' or 'loose_end' and edges 'learned' or "
                f"'strongest'; got {merge_op!r} and {edges!r}"
            )
        self.num_predecessors = num_predecessors
        self.label = label
        self.preprocessor = preprocessor
        nodes = range(num_predecessors, num_predecessors + num_nodes)
        self.nodes = nn.ModuleDict(
            {str(n): Node(n, op_candidates, num_ops_per_node, label, edges) for n in nodes}
        )
        inputs = [cast("Node", node).inputs for node in self.nodes.values()]
        self.loose: tuple[int, ...] | Value = tuple(range(num_nodes))  # positions among the nodes
        self.n_outputs: int | Value = num_nodes
        self.concat_dim = concat_dim
        if merge_op == "loose_end":
            # From the last node back: what takes a node is known when its turn comes.
            back = [*zip(inputs, nodes, strict=True)][::-1]
            passed = [(value, partial(_passed, num_predecessors, n)) for value, n in back]
            self.loose = Fold("which are loose", (frozenset(), ()), passed, itemgetter(1))
            counted = [(value, partial(_counted, num_predecessors, n)) for value, n in back]
            self.n_outputs = Fold("loose ends", (frozenset(), 0), counted, itemgetter(1))
        self.postprocessor = postprocessor

    def forward(self, *inputs: Any) -> Any:
        states = list(inputs[0] if len(inputs) == 1 and isinstance(inputs[0], list | tuple) else inputs)
        if len(states) != self.num_predecessors:
            raise ValueError(
                f"{described('Cell', self.label)} takes {self.num_predecessors} inputs (num_predecessors); "
                f"got {len(states)}"
            )
        predecessors = list(states)
        if self.preprocessor is not None:
            states = list(self.preprocessor(states))
        for node in self.nodes.values():
            states.append(node(states))
        output = torch.cat(self._concatenated(states[len(predecessors) :]), self.concat_dim)
        return output if self.postprocessor is None else self.postprocessor(output, predecessors)

    def _concatenated(self, nodes: Sequence[Tensor]) -> list[Tensor]:
        """The nodes that are loose; under mixing weights, the expectation of what is in each place."""
        if not isinstance(self.loose, Value):
            return [nodes[position] for position in self.loose]
        found = combinations({"loose": self.loose})
        if not found[0].is_mixed:
            return [nodes[position] for position in found[0].values["loose"]]
        weights = weights_of(found)
        places = max(len(combination.values["loose"]) for combination in found)
        stands = torch.zeros(len(found), places, len(nodes), dtype=weights.dtype, device=weights.device)
        for outcome, combination in enumerate(found):
            for place, node in enumerate(combination.values["loose"]):
                stands[outcome, place, node] = 1.0
        shares = torch.tensordot(weights, stands, dims=1)
        present = shares.sum(dim=1, keepdim=True)
        # Who takes the output masks what is absent (`hwnas.nn.mixed`). A place that is absent for sure holds
        # what could be there, for the gradient that says what it would be worth.
        could = stands.sum(dim=0) / stands.sum(dim=(0, 2))[:, None]
        rows = torch.where(present > 0, shares / torch.where(present > 0, present, 1.0), could)
        return [mixture(row, list(nodes), "nodes of a Cell") for row in rows]

    def check_can_mix(self) -> None:
        """Raises ``ValueError`` where the width depends on edges that have no probabilities."""
        depends = isinstance(self.n_outputs, Value) and self.n_outputs.leaves()
        if depends and any(cast("Node", node).edges == "strongest" for node in self.nodes.values()):
            raise ValueError(
                "merge_op='loose_end' concatenates other nodes for other edges, and with edges='strongest' "
                "these are not known while all run; use edges='learned' or merge_op='all', or search with a "
                "strategy that runs one path (RandomOneShot, ENAS)"
            )


@final
class Node(Branching):
    """The sum of operations on some of the states before it."""

    def __init__(
        self,
        index: int,
        op_candidates: Sequence[nn.Module | OpFactory] | Mapping[str, nn.Module | OpFactory],
        num_ops: int,
        cell_label: str | None,
        edges: Edges,
    ) -> None:
        super().__init__()

        def label(name: object) -> str | None:
            return None if cell_label is None else f"{cell_label}.{index}.{name}"

        if num_ops >= index:
            every = tuple(range(index))
            self.inputs: Value = Expression(str(every), partial(tuple, every), ())
        else:
            self.inputs = ValueChoice(itertools.combinations(range(index), num_ops), label("inputs"))
        self.edges: Edges = edges
        for source in range(index):
            candidates = _candidates(op_candidates, index, source)
            self.add_module(str(source), LayerChoice(candidates, label(source)))
        if edges == "strongest" and set(self[0].options) == {NONE}:
            raise ValueError(
                f"{described('Cell', cell_label)} with edges='strongest' needs a candidate besides '{NONE}'"
            )

    def __getitem__(self, source: int) -> LayerChoice:
        """The choice on the edge from a state."""
        return cast("LayerChoice", self._modules[str(source)])

    def __len__(self) -> int:
        """How many states it chooses from."""
        return len(self._modules)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        found = combinations({"inputs": self.inputs})
        picked = _sources(combination for combination in found if combination.is_picked)
        if self.edges == "strongest" or not found[0].is_mixed:
            return cast("Tensor", reduce_inputs([self[s](states[s]) for s in picked], "sum"))
        live = _sources(found)
        outputs = [run_child(self[s], s in picked, (states[s],), {}) for s in live]
        weights = weights_of(found)
        is_chosen = [[float(s in combination.values["inputs"]) for s in live] for combination in found]
        weights = weights @ torch.tensor(is_chosen, dtype=weights.dtype, device=weights.device)
        return mixture(weights, outputs, f"operations into one node of a Cell, over {self.inputs!r},")

    def branches(self) -> Iterator[tuple[str, nn.Module, Condition]]:
        labels = tuple(leaf.name() for leaf in self.inputs.leaves())
        for source in range(len(self)):
            yield str(source), self[source], Condition(labels, partial(_takes, self.inputs, source))

    def run_all(self, call: BranchCall, states: Sequence[Tensor]) -> Any:
        outputs = [call(*branch, state) for branch, state in zip(self.branches(), states, strict=True)]
        return reduce_inputs([outputs[source] for source in self.inputs.now()], "sum")

    def check_can_mix(self) -> None:
        """Always possible."""

    def derived_probabilities(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of edges that are kept by strength, and of their operations without ``"none"``."""
        if self.edges == "learned":
            return {}
        rows, strengths = {}, []
        for source in range(len(self)):
            choice = self[source]
            label = named(choice.label, "LayerChoice", choice.options)
            given = probabilities[label].double()
            is_kept = torch.tensor([option != NONE for option in choice.options], device=given.device)
            kept = torch.where(is_kept, given.clamp_min(_LEAST), 0.0)
            rows[label] = kept / kept.sum()
            strengths.append(kept.max().log())
        # In proportion to the products of the strengths: the likeliest states are the strongest.
        products = [
            torch.stack([strengths[source] for source in subset]).sum() for subset in self.inputs.all()
        ]
        rows |= {leaf.name(): torch.stack(products).softmax(dim=0) for leaf in self.inputs.leaves()}
        return rows

    def frozen(self, freezer: Freezer) -> nn.Module:
        sources = self.inputs.of(freezer.architecture)
        chosen = ChosenEdges({source: freezer(cast("nn.Module", self[source])) for source in sources})
        chosen.training = self.training  # not train(), which would reach the operations
        return chosen

    def extra_repr(self) -> str:
        return f"inputs={self.inputs!r}"


@final
class ChosenEdges(nn.Module):
    """What a `Node` becomes in a subnet: the operations on the states that it takes."""

    def __init__(self, operations: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.sources = tuple(operations)
        for source, operation in operations.items():
            self.add_module(str(source), operation)

    def forward(self, states: Sequence[Tensor]) -> Any:
        return reduce_inputs([self.get_submodule(str(s))(states[s]) for s in self.sources], "sum")


def _candidates(
    given: Sequence[nn.Module | OpFactory] | Mapping[str, nn.Module | OpFactory], node: int, source: int
) -> list[nn.Module] | dict[str, nn.Module]:
    def make(candidate: nn.Module | OpFactory) -> nn.Module:
        return copy.deepcopy(candidate) if isinstance(candidate, nn.Module) else candidate(node, 0, source)

    if isinstance(given, Mapping):
        return {name: make(candidate) for name, candidate in given.items()}
    return [make(candidate) for candidate in given]


def _sources(found: Iterable[Combination]) -> list[int]:
    return sorted({source for combination in found for source in combination.values["inputs"]})


# Bound by `partial`, not by a lambda: a space must survive pickling.
def _takes(inputs: Value, source: int, architecture: Mapping[str, Option]) -> bool:
    return source in inputs.of(architecture)


def _passed(
    first: int, node: int, state: tuple[frozenset[int], tuple[int, ...]], inputs: tuple[int, ...]
) -> tuple[frozenset[int], tuple[int, ...]]:
    """From a node on: which nodes before it are taken, and the positions of those that are loose."""
    taken, loose = state
    sources = frozenset(source for source in inputs if source >= first)
    return taken - {node} | sources, loose if node in taken else (node - first, *loose)


def _counted(
    first: int, node: int, state: tuple[frozenset[int], int], inputs: tuple[int, ...]
) -> tuple[frozenset[int], int]:
    """As `_passed`, with how many are loose."""
    taken, _ = _passed(first, node, (state[0], ()), inputs)
    return taken, state[1] + (node not in state[0])
