from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hwnas import Cell, Gate, LayerChoice, ModelSpace, Repeat
from hwnas.classification import Classification
from hwnas.derive import score
from hwnas.nn import Conv2d
from hwnas.strategies import DARTS, Proxyless
from profilers import FlopsProfiler
from profilers.penalty import ExpectationProfilerPenalty
from profilers.space import Architecture
from tests.hwnas.strategies.tiny import CLASSES, fit, space_of


class Zero(nn.Module):
    """DARTS's "none": no information goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


OPS: dict[str, Any] = {
    "none": Zero(),
    "conv": lambda *_: nn.Conv2d(3, 3, 3, padding=1),
    "point": lambda *_: nn.Conv2d(3, 3, 1),
    "skip": nn.Identity(),
}


def cell(nodes: int = 2, **options: Any) -> Cell:
    return Cell(OPS, nodes, **{"num_predecessors": 2, "label": "cell", **options})


class Net(nn.Module):
    """Two cells of one label, chained as in DARTS: each takes the two before it."""

    def __init__(self, edges: Any = "learned", cells: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.cells = nn.ModuleList(
            cell(edges=edges, preprocessor=Shrink(6 if i else 3), postprocessor=Chain()) for i in range(cells)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        states = [self.stem(images)] * 2
        for one in self.cells:
            states = one(states)
        scores: Tensor = self.head(states[1].mean((2, 3)))
        return scores


class Shrink(nn.Module):
    """Brings what the cell before gave to the cell's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        return [states[0][:, :3], self.last(states[1])]


class Chain(nn.Module):
    def forward(self, output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[-1], output]


def run(space: ModelSpace, architecture: Mapping[str, Any], *inputs: Any) -> Any:
    with space.running(space.gates_of(architecture)):
        return space(*inputs)


def random_rows(space: ModelSpace, seed: int, spread: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        label: torch.randn(len(found), generator=generator, dtype=torch.double).mul(spread).softmax(0)
        for label, found in space.options.items()
    }


# ---- what runs


@pytest.mark.parametrize("merge_op", ["all", "loose_end"])
def test_cell_computes_the_graph_that_its_options_name(merge_op: Any) -> None:
    space = ModelSpace(cell(3, merge_op=merge_op)).double()
    architecture = {
        **space.default(),
        "cell.2.0": "conv",
        "cell.2.1": "point",
        "cell.3.inputs": (0, 2),
        "cell.3.0": "skip",
        "cell.3.2": "point",
        "cell.4.inputs": (1, 3),
        "cell.4.1": "conv",
        "cell.4.3": "none",
    }
    ops = space.network.nodes  # type: ignore[union-attr]  # a Cell's
    zero, one = torch.randn(2, 2, 3, 5, 5, dtype=torch.double)
    two = ops["2"][0]["conv"](zero) + ops["2"][1]["point"](one)  # type: ignore[index]
    three = zero + ops["3"][2]["point"](two)  # type: ignore[index]
    four = ops["4"][1]["conv"](one) + 0 * three  # type: ignore[index]
    expected = torch.cat([two, three, four] if merge_op == "all" else [four], 1)
    torch.testing.assert_close(run(space, architecture, zero, one), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(space, architecture, [zero, one]), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**30))
@settings(deadline=None, max_examples=25)
def test_loose_ends_are_the_nodes_that_no_node_takes(seed: int) -> None:
    network = cell(3, num_predecessors=1, merge_op="loose_end")
    space = ModelSpace(network)
    architecture = space.random(torch.Generator().manual_seed(seed))
    taken = {s for node in (2, 3) for s in architecture.get(f"cell.{node}.inputs", (0, 1))}
    subnet = space.freeze(architecture)
    assert isinstance(subnet, Cell)
    assert subnet.n_outputs == len({1, 2, 3} - taken)
    assert subnet(torch.zeros(1, 3, 4, 4)).shape == (1, 3 * subnet.n_outputs, 4, 4)


def test_an_edge_that_is_not_chosen_is_not_in_the_subnet_and_not_counted() -> None:
    space = ModelSpace(cell(2))
    architecture = {**space.default(), "cell.3.inputs": (0, 2), "cell.3.0": "conv", "cell.3.1": "conv"}
    assert "cell.3.1" not in space.active(architecture)
    node = space.freeze(architecture).nodes["3"]  # type: ignore[union-attr, index]
    assert [name for name, _ in node.named_children()] == ["0", "2"]  # type: ignore[union-attr]
    # node 2 takes both of its two states; node 3 takes two of three
    assert space.size == 4**2 * 3 * 4**2


def test_factories_are_told_the_edge_and_modules_are_copied() -> None:
    made: list[tuple[int, int, int]] = []

    def factory(node: int, op: int, source: int) -> nn.Module:
        made.append((node, op, source))
        return nn.Identity()

    layer = nn.Linear(2, 2)
    network = Cell([factory, layer], 2, num_predecessors=1, label="c")
    assert made == [(1, 0, 0), (2, 0, 0), (2, 0, 1)]
    assert ModelSpace(network).options["c.2.1"] == (0, 1)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert len({id(module) for module in linears}) == 3
    assert layer not in linears


def test_cells_of_one_label_are_one_decision_and_others_are_named_after_their_place() -> None:
    shared = ModelSpace(Net(cells=3))
    assert shared.size == ModelSpace(cell()).size
    plain = ModelSpace(nn.ModuleDict({"a": cell(label=None), "b": cell(label=None)}))
    assert plain.size == shared.size**2
    assert {"a.nodes.3.inputs", "b.nodes.3.2"} <= plain.options.keys()


def test_cell_below_a_branch_is_inactive_with_its_edges() -> None:
    space = ModelSpace(nn.Sequential(LayerChoice([nn.Identity(), cell(num_predecessors=1)], label="op")))
    assert space.size == 1 + 4 * 4**2
    assert set(space.active(space.default())) == {"op"}


def test_preprocessor_and_postprocessor_see_what_nni_shows_them() -> None:
    network = cell(
        1,
        preprocessor=lambda states: [state + 1 for state in states],
        postprocessor=lambda output, inputs: (output, inputs),
    )
    space = ModelSpace(network)
    x = torch.zeros(1, 3, 2, 2)
    output, inputs = run(space, {**space.default(), "cell.2.0": "skip"}, x, x)
    assert torch.equal(output, torch.ones(1, 3, 2, 2))
    assert inputs[0] is inputs[1] is x


def test_choices_in_a_preprocessor_are_part_of_the_space() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Identity(), nn.Tanh()], label="before")

        def forward(self, states: list[Tensor]) -> list[Tensor]:
            return [self.op(state) for state in states]

    space = ModelSpace(cell(1, preprocessor=Before()))
    assert space.size == 2 * 4**2
    x = torch.randn(1, 3, 2, 2)
    architecture = {**space.default(), "cell.2.0": "skip", "before": 1}
    torch.testing.assert_close(space.freeze(architecture)(x, x), x.tanh())


def test_a_node_that_takes_every_state_has_no_choice_of_inputs() -> None:
    space = ModelSpace(cell(2, num_predecessors=1, num_ops_per_node=2, merge_op="loose_end"))
    assert list(space.options) == ["cell.1.0", "cell.2.0", "cell.2.1"]
    assert space.size == 4**3
    space.check_can_mix()  # its loose ends are always the same


# ---- what is refused


def test_loose_ends_of_strongest_edges_are_refused_when_a_strategy_that_mixes_takes_the_space_on() -> None:
    space = ModelSpace(nn.ModuleDict({"a": cell(merge_op="loose_end", edges="strongest")}))
    message = r"'a' cannot be searched with mixing weights: merge_op='loose_end'.*merge_op='all'"
    for strategy in (DARTS(), Proxyless()):
        with pytest.raises(ValueError, match=message):
            strategy.prepare_for(space)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 0}, "Cell 'c' needs at least one node.*num_nodes=0, num_ops_per_node=2"),
        ({"num_ops_per_node": 0}, "num_ops_per_node=0"),
        ({"num_predecessors": 0}, "num_predecessors=0"),
        ({"merge_op": "any"}, "merge_op 'all' or 'loose_end' and edges .*; got 'any' and 'learned'"),
        ({"edges": "weakest"}, "edges 'learned' or 'strongest'; got 'all' and 'weakest'"),
        ({"op_candidates": []}, r"LayerChoice 'c\.1\.0' needs at least one nn.Module"),
        ({"op_candidates": [lambda *_: 3]}, r"LayerChoice 'c\.1\.0' needs .*got \['int'\]"),
        ({"op_candidates": {"none": Zero()}, "edges": "strongest"}, "needs a candidate besides 'none'"),
    ],
)
def test_impossible_cells_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**{"op_candidates": OPS, "num_nodes": 1, "label": "c", **options})


def test_wrong_number_of_inputs_is_refused() -> None:
    space = ModelSpace(cell())
    with pytest.raises(ValueError, match=r"Cell 'cell' takes 2 inputs \(num_predecessors\); got 1"):
        space(torch.zeros(1, 3, 2, 2))


# ---- edges that are learned


def test_edges_of_states_that_are_not_picked_keep_no_graph_and_others_do_not_run() -> None:
    network = cell(3, edges="learned", num_ops_per_node=1, num_predecessors=1)
    space = ModelSpace(network)
    graphs: dict[int, bool] = {}
    for source in range(3):
        layer = network.nodes["3"][source]["conv"]  # type: ignore[index]
        layer.register_forward_hook(lambda _, __, out, s=source: graphs.update({s: out.requires_grad}))
    gates = space.gates_of({label: "conv" if "conv" in o else o[0] for label, o in space.options.items()})
    weights = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    with space.running({**gates, "cell.3.inputs": Gate((1,), weights, run=(1, 2))}):
        space(torch.randn(1, 3, 4, 4))
    assert graphs == {1: True, 2: False}


# ---- edges by strength


def genotype(rows: Mapping[str, Tensor], nodes: int, predecessors: int) -> dict[str, Any]:
    """DARTS's rule (1806.09055, section 2.4), read from the paper: the two strongest edges of each node."""
    ops = list(OPS)
    found: dict[str, Any] = {}
    for node in range(predecessors, predecessors + nodes):
        best = {}
        for source in range(node):
            p = rows[f"cell.{node}.{source}"]
            best[source] = max((float(p[i]), name) for i, name in enumerate(ops) if name != "none")
        kept = sorted(best, key=lambda source: best[source][0], reverse=True)[:2]
        if node > 2:
            found[f"cell.{node}.inputs"] = tuple(sorted(kept))
        found |= {f"cell.{node}.{source}": best[source][1] for source in kept}
    return found


def derived_by_darts(space: ModelSpace, rows: Mapping[str, Tensor], max_cost: Any = None) -> Architecture:
    strategy = DARTS()
    strategy.prepare_for(space)
    for label, row in rows.items():
        strategy.logits.of[label].data = row.log()
    return strategy.architecture(max_cost)


@given(st.integers(0, 2**30), st.sampled_from([0.01, 1.0, 4.0]))
@settings(deadline=None, max_examples=30)
def test_strongest_edges_without_a_budget_are_the_genotype_of_darts(seed: int, spread: float) -> None:
    space = ModelSpace(cell(4, edges="strongest"))
    rows = random_rows(space, seed, spread)
    assert space.active(derived_by_darts(space, rows)) == genotype(rows, 4, 2)


@pytest.fixture(scope="module")
def metered() -> tuple[ModelSpace, FlopsProfiler, list[tuple[Architecture, float]]]:
    """A space of two cells, and the active choices of each of its networks with their cost."""
    space = ModelSpace(Net("strongest"))
    profiler = FlopsProfiler(space, torch.zeros(1, 1, 8, 8))
    return space, profiler, [(space.active(a), profiler.profile(a)) for a in space.grid()]


@given(seed=st.integers(0, 2**30), share=st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
@settings(deadline=None, max_examples=15)
def test_strongest_edges_within_a_budget_are_the_best_by_enumeration(
    metered: Any, seed: int, share: float
) -> None:
    space, profiler, networks = metered
    rows = random_rows(space, seed)
    low, high = profiler.cost.bounds()
    budget = low + (high - low) * share
    found = derived_by_darts(space, rows, {profiler: budget})
    assert profiler.profile(found) <= budget

    def product(active: Architecture) -> float:
        """The log-probability of the kept operations."""
        kept = {label: option for label, option in active.items() if not label.endswith("inputs")}
        return sum(float(rows[label][list(OPS).index(option)].log()) for label, option in kept.items())

    feasible = [active for active, cost in networks if cost <= budget and "none" not in active.values()]
    assert product(space.active(found)) == pytest.approx(max(map(product, feasible)), abs=1e-6)


def test_none_is_derived_where_a_budget_leaves_nothing_else() -> None:
    ops = {"none": Zero(), "conv": nn.Conv2d(3, 3, 3, padding=1), "point": nn.Conv2d(3, 3, 1)}
    space = ModelSpace(Cell(ops, 1, num_predecessors=3, label="cell", edges="strongest"))
    profiler = FlopsProfiler(space, *torch.zeros(3, 1, 3, 4, 4))
    rows = random_rows(space, 0)
    point = 3 * 3 * 16
    for budget, expected in ((2 * point, 0), (point, 1), (0, 2)):
        found = derived_by_darts(space, rows, {profiler: budget})
        assert list(space.active(found).values()).count("none") == expected


def test_best_cell_scores_zero_wherever_it_stands() -> None:
    """A deeper network does not score lower for having more cells."""
    repeat = Repeat(lambda i: cell(1, num_predecessors=1, label=f"c{i}", edges="strongest"), (1, 2), "depth")
    space = ModelSpace(nn.Sequential(repeat))
    rows = random_rows(space, 0)
    found = score(space, rows)
    assert max(map(found.of, space.grid())) == pytest.approx(0.0, abs=1e-9)
    by_depth = [max(found.of(a) for a in space.grid() if a["depth"] == depth) for depth in (1, 2)]
    assert by_depth[1] - by_depth[0] == pytest.approx(float((rows["depth"][1] / rows["depth"][0]).log()))


def test_strongest_edges_all_run_with_weight_one_when_mixed() -> None:
    space = ModelSpace(cell(2, edges="strongest")).double()
    rows = {label: row.requires_grad_() for label, row in random_rows(space, 0).items()}
    zero, one = torch.randn(2, 2, 3, 5, 5, dtype=torch.double)
    with space.running({label: Gate(tuple(range(len(row))), row) for label, row in rows.items()}):
        found = space(zero, one)

    def edge(node: int, source: int, x: Tensor) -> Tensor:
        choice = space.network.nodes[str(node)][source]  # type: ignore[union-attr, index]
        p = rows[f"cell.{node}.{source}"]
        total: Tensor = sum(p[i] * choice[name](x) for i, name in enumerate(OPS))  # type: ignore[index]
        return total

    two = edge(2, 0, zero) + edge(2, 1, one)
    three = edge(3, 0, zero) + edge(3, 1, one) + edge(3, 2, two)
    torch.testing.assert_close(found, torch.cat([two, three], 1))
    gradients = torch.autograd.grad(found.square().sum(), list(rows.values()), allow_unused=True)
    for label, gradient in zip(rows, gradients, strict=True):
        assert (gradient is None) == label.endswith("inputs")


def test_strongest_edges_under_one_path_are_those_of_the_architecture() -> None:
    learned, strongest = (ModelSpace(cell(2, edges=edges)).double() for edges in ("learned", "strongest"))
    strongest.load_state_dict(learned.state_dict())
    x = torch.randn(2, 1, 3, 4, 4, dtype=torch.double)
    for architecture in itertools.islice(learned.grid(), 0, None, 37):
        expected = run(learned, architecture, *x)
        torch.testing.assert_close(run(strongest, architecture, *x), expected)
        torch.testing.assert_close(strongest.freeze(architecture)(*x), expected)


def test_penalty_reaches_the_operations_through_the_edges_that_would_be_kept(metered: Any) -> None:
    """The expected cost of the derived distribution, by enumeration, with its gradient."""
    space, profiler, networks = metered
    logits = {label: row.log().requires_grad_() for label, row in random_rows(space, 3).items()}
    derived = space.derived_probabilities({label: found.softmax(0) for label, found in logits.items()})
    for label, row in derived.items():
        assert float(row.detach().sum()) == pytest.approx(1.0)
        assert label.endswith("inputs") or float(row[0].detach()) == 0.0  # no "none"
    expected = torch.zeros((), dtype=torch.double)
    for active, cost in networks:
        chances = [derived[n][space.options[n].index(option)] for n, option in active.items()]
        expected = expected + torch.stack(chances).prod() * cost
    found = profiler.cost.expected(derived)
    torch.testing.assert_close(found, expected)
    wanted = [row for label, row in logits.items() if not label.endswith("inputs")]
    ours = torch.autograd.grad(found, wanted, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, wanted))
    assert all(gradient.abs().sum() > 0 for gradient in ours)


# ---- searched, derived, exported


STRATEGIES: dict[str, Any] = {
    "darts": DARTS,
    "proxyless-two": lambda **options: Proxyless("two", **options),
    "proxyless-full": lambda **options: Proxyless("full", **options),
}


@pytest.mark.filterwarnings("ignore:(DARTS|Proxyless)\\b:UserWarning")  # two epochs decide little
@pytest.mark.parametrize("edges", ["learned", "strongest"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_searched_cell_keeps_its_budget_and_freezes_with_weights(name: str, edges: Any) -> None:
    torch.manual_seed(0)
    module: pl.LightningModule = Classification(ModelSpace(Net(edges)), CLASSES)
    space = space_of(module)
    profiler = FlopsProfiler(space, torch.zeros(1, 1, 8, 8))
    low, high = profiler.cost.bounds()
    budget = low + 0.4 * (high - low)
    strategy = STRATEGIES[name](
        arc_learning_rate=0.1, penalty=ExpectationProfilerPenalty(profiler, baseline=budget, scale=1.0)
    )
    before = {n: p.detach().clone() for n, p in space.named_parameters()}
    fit(strategy, module, max_epochs=2)
    moved = {n for n, p in space.named_parameters() if not torch.equal(p, before[n])}
    assert any(".nodes." in n for n in moved)
    start = DARTS(seed=strategy.seed)
    start.prepare_for(space)
    for label, logits in strategy.logits.of.items():
        learns = len(logits) > 1 and (edges == "learned" or not label.endswith("inputs"))
        if learns and name != "proxyless-two":  # which moves two logits a step
            assert not torch.equal(logits, start.logits.of[label]), label
        if not learns and name == "proxyless-full":  # not even the penalty moves what is not derived
            assert torch.equal(logits, start.logits.of[label]), label
    architecture = strategy.architecture()
    assert profiler.profile(architecture) <= budget
    x = torch.randn(4, 1, 8, 8)
    space.eval()
    torch.testing.assert_close(space.freeze(architecture)(x), run(space, architecture, x))


def test_cell_that_shrinks_by_its_factories_searches_like_any_other() -> None:
    """A reduction cell: operations on the cell's inputs have stride 2, those on its nodes stride 1."""

    def reduce(_: int, __: int, source: int) -> nn.Module:
        return nn.Conv2d(3, 3, 3, stride=2 if source < 2 else 1, padding=1)

    def pool(_: int, __: int, source: int) -> nn.Module:
        return nn.AvgPool2d(3, stride=2 if source < 2 else 1, padding=1)

    space = ModelSpace(Cell({"conv": reduce, "pool": pool}, 2, num_predecessors=2, label="r")).double()
    x = torch.randn(2, 1, 3, 8, 8, dtype=torch.double)
    profiler = FlopsProfiler(space, *x)
    for architecture in space.grid():
        subnet = space.freeze(architecture)
        assert subnet(*x).shape == (1, 6, 4, 4)
        torch.testing.assert_close(subnet(*x), run(space, architecture, *x), rtol=1e-12, atol=1e-12)
    at_once = {**space.default(), "r.3.inputs": (0, 1)}
    assert profiler.profile(at_once) == 4 * 3 * 3 * 9 * 16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("merge_op", ["all", "loose_end"])
def test_frozen_cell_runs_as_onnx(merge_op: Any, tmp_path: Path) -> None:
    import onnxruntime

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(3, merge_op=merge_op)
            self.head = Conv2d(self.cell.n_outputs * 3, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.cell(x, x.flip(3)))

    space = ModelSpace(Headed())
    subnet = space.freeze(space.random(torch.Generator().manual_seed(1))).eval()
    x = torch.randn(2, 3, 6, 6)
    torch.onnx.export(subnet, (x,), tmp_path / "cell.onnx", dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "cell.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, subnet(x).detach().numpy(), rtol=1e-4, atol=1e-5)
