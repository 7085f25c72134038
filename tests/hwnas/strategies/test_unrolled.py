from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hwnas import LayerChoice, ModelSpace
from hwnas.strategies import DARTS
from tests.contracts.strategy import DifferentiableStrategyContract
from tests.hwnas.strategies.tiny import classification, fit, trainer


class TestSecondOrder(DifferentiableStrategyContract):
    trainer_options = {"gradient_clip_val": 0.1}

    def make(self, **options: Any) -> DARTS:
        return DARTS(0.1, order=2, **options)


class Smooth(pl.LightningModule):
    """Two smooth options, so that finite differences are right to many digits."""

    def __init__(self, **sgd: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3)]
        self.space = ModelSpace(nn.Sequential(LayerChoice(options, label="op"), nn.Linear(3, 2)))
        self.sgd = sgd

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.space(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        first, *others = self.parameters()
        groups = [{"params": [first], "lr": 0.2}, {"params": others}]
        return torch.optim.SGD(groups, **{"lr": 0.3, **self.sgd})


def batches(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)) for _ in range(4)
    ]
    return DataLoader(pairs, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def brute_force(module: Smooth, logits: Tensor, train: Any, batch: Any, optimizer: Any) -> Tensor:
    """Differentiates through one step of SGD, written out from torch's documentation."""
    network = module.space.network
    choice, head = network[0], network[1]
    named = {id(p): n for n, p in network.named_parameters()}
    weights = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()}
    names = list(weights)

    def loss(weights: dict[str, Tensor], logits: Tensor, pair: Any) -> Tensor:
        p = logits.softmax(0)
        call = torch.func.functional_call
        outputs = [
            call(
                choice[i],
                {n.split(".", 2)[2]: w for n, w in weights.items() if n.startswith(f"0.{i}.")},
                pair[0],
            )
            for i in (0, 1)
        ]
        mixed = p[0] * outputs[0] + p[1] * outputs[1]
        scores = call(head, {n[2:]: w for n, w in weights.items() if n.startswith("1.")}, mixed)
        return F.mse_loss(scores, pair[1])

    alpha = logits.detach().clone().requires_grad_()
    gradients = torch.autograd.grad(loss(weights, alpha, train), list(weights.values()), create_graph=True)
    moved = dict(weights)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = named[id(parameter)]
            g = gradients[names.index(name)] + group["weight_decay"] * weights[name].detach()
            momentum = group["momentum"]
            if momentum:
                old = optimizer.state[parameter].get("momentum_buffer")
                velocity = g if old is None else momentum * old + (1 - group["dampening"]) * g
                g = g + momentum * velocity if group["nesterov"] else velocity
            moved[name] = weights[name].detach() - group["lr"] * g
    return torch.autograd.grad(loss(moved, alpha, batch), alpha)[0]


@pytest.mark.parametrize(
    "sgd",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3},
    ],
    ids=["plain", "momentum", "nesterov", "dampening"],
)
def test_second_order_gradient_equals_brute_force_unrolling(sgd: dict[str, Any]) -> None:
    module, strategy = Smooth(**sgd).double(), DARTS(order=2)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Compare(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, train: Any, batch_idx: int
        ) -> None:
            logits = strategy.logits.of["op"].detach().clone()
            batch = list(batches(2))[batch_idx]
            batch = [part.double() for part in batch]
            expected = brute_force(module, logits, train, batch, trainer.optimizers[0])
            first = brute_force(module, logits, train, batch, torch.optim.SGD(module.parameters(), lr=0.0))
            seen.append((expected, first, logits))

    found: list[Tensor] = []
    original = strategy.differentiate

    def differentiate(step: Any) -> Any:
        gradients = original(step)
        found.append(gradients[0].clone())
        return gradients

    strategy.differentiate = differentiate  # type: ignore[method-assign]  # watched
    strategy.arch_dataloader = batches(2)
    options = {"precision": "64-true"}
    trainer(Compare(), strategy, **options).fit(module, batches(1))
    assert len(found) == len(seen) == 4
    for gradient, (expected, first_order, _) in zip(found, seen, strict=True):
        assert (gradient - expected).norm() < 0.01 * (expected - first_order).norm() + 1e-6


class Adam(Smooth):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (Adam, {}, r"one step of torch.optim.SGD ahead; configure_optimizers returned \['Adam'\]"),
        (Smooth, {"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2"),
        (Smooth, {"precision": "bf16-mixed"}, "precision is 'bf16-mixed'"),
    ],
)
def test_what_cannot_be_looked_ahead_is_refused(module: Any, options: dict[str, Any], said: str) -> None:
    strategy = DARTS(order=2, arch_dataloader=batches(2))
    with pytest.raises(ValueError, match=said):
        trainer(strategy, **options).fit(module(), batches(1))


def test_order_is_one_or_two() -> None:
    with pytest.raises(ValueError, match="order must be 1 or 2; got 3"):
        DARTS(order=3)  # type: ignore[arg-type]  # that is the point


def test_orders_lead_to_different_logits() -> None:
    found = []
    for order in (1, 2):
        strategy = DARTS(0.1, order=order)  # type: ignore[arg-type]  # a loop forgets the literals
        fit(strategy, classification())
        found.append(strategy.probabilities())
    assert all(not torch.equal(found[0][label], found[1][label]) for label in found[0])
