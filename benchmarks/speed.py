"""How fast a search is, beside plain PyTorch in one run: CPU time of one thread, medians of rounds.

Times an architecture step and a weight step of DARTS against two forward-backward passes of the same candidates
written in plain PyTorch, counts what Proxyless keeps for its backward pass against training one path, and
times the cost of the default space: building it, and summing it up for a million architectures.

    python benchmarks/speed.py [--rounds 9] [--batch 32] [--seed 0]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas import Gate, ModelSpace
from hwnas.spaces import SmallMobileNet
from hwnas.strategies import DARTS, Proxyless
from hwnas.strategies.side_effects import frozen_weights, kept_buffers
from lookup_tables import fingerprint
from profilers import FlopsProfiler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
warnings.filterwarnings("ignore", category=DeprecationWarning)
torch.set_num_threads(1)
torch.manual_seed(arguments.seed)


class PlainCandidates(nn.Module):
    """The default space at its largest widths in plain ``torch.nn``: all candidates, a weighted sum."""

    def __init__(self, space: ModelSpace) -> None:
        super().__init__()
        largest = {label: options[-1] for label, options in space.options.items()}
        layers = [label for label in space.options if not label.endswith("width")]
        networks = {
            option: space.freeze(
                {**largest, **{label: option for label in layers if option in space.options[label]}}
            )
            for label in layers
            for option in space.options[label]
        }
        self.stem, self.head, self.classifier = (
            getattr(networks["k3_e3"], name) for name in ("stem", "head", "classifier")
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(networks[option].layers[index] for option in space.options[label])
            for index, label in enumerate(layers)
        )
        self.logits = nn.ParameterList(torch.zeros(len(space.options[label])) for label in layers)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for candidates, logits in zip(self.layers, self.logits, strict=True):
            weights = logits.softmax(0)
            features = sum(w * layer(features) for w, layer in zip(weights, candidates, strict=True))
        scores: Tensor = self.classifier(self.head(features))
        return scores


images = torch.randn(arguments.batch, 1, 28, 28)
labels = torch.randint(10, (arguments.batch,))
space = ModelSpace(SmallMobileNet())
plain = PlainCandidates(space)
darts = DARTS(seed=arguments.seed)
darts.prepare_for(space)


def run(gates: dict[str, Gate]) -> Tensor:
    with space.running(gates):
        return F.cross_entropy(space(images), labels)


def architecture_step() -> None:
    with kept_buffers(space), frozen_weights(space):
        loss = run(dict(darts.architecture_gates(torch.Generator())))
        torch.autograd.grad(loss, darts.logits.parameters())


def weight_step() -> None:
    run(dict(darts.weight_gates(torch.Generator()))).backward()
    space.zero_grad()


def two_passes() -> None:
    for _ in range(2):
        F.cross_entropy(plain(images), labels).backward()
        plain.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Distinct storages kept for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*space.parameters(), *space.buffers())}
    found: dict[int, Tensor] = {}  # the tensors themselves: a freed address would be met again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def saved_ratio(proxyless: Proxyless, draws: int = 20) -> tuple[float, float, float]:
    """MB of an architecture step, MB of training the path that it picked, and the ratio of the means."""
    steps, paths = [], []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(arguments.seed + draw)
        gates = dict(proxyless.architecture_gates(generator))
        with frozen_weights(space):
            steps.append(saved_bytes(lambda gates=gates: run(gates)))  # type: ignore[misc]
        picked = {label: Gate(gate.picked) for label, gate in gates.items()}
        paths.append(saved_bytes(lambda picked=picked: run(picked)))  # type: ignore[misc]
    return statistics.mean(steps) / 1e6, statistics.mean(paths) / 1e6, sum(steps) / sum(paths)


rounds = []
for number in range(arguments.rounds + 1):
    row = seconds(architecture_step), seconds(weight_step), seconds(two_passes)
    if number:  # the first warms up
        rounds.append(row)
architecture_s, weight_s, plain_s = (statistics.median(column) for column in zip(*rounds, strict=True))
ratios = sorted((a + w) / p for a, w, p in rounds)

print(f"{fingerprint().cpu}, {fingerprint().cores} cores, one thread; Python {platform.python_version()},")
print(
    f"torch {torch.__version__}; batch {arguments.batch} of 28x28, seed {arguments.seed}; CPU seconds, medians of"
)
print(
    f"{arguments.rounds} rounds: python benchmarks/speed.py --rounds {arguments.rounds} --seed {arguments.seed}\n"
)
print("| what | measured | aim |\n|---|---|---|")
print(f"| DARTS architecture step / weight step | {architecture_s:.3f} s / {weight_s:.3f} s | |")
print(f"| two plain passes over all candidates | {plain_s:.3f} s | |")
print(
    f"| DARTS step / two plain passes | {statistics.median(ratios):.2f} "
    f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | <= 0.75 |"
)
for paths in ("two", "full"):
    strategy = Proxyless(paths, seed=arguments.seed)
    strategy.prepare_for(space)
    step_mb, path_mb, ratio = saved_ratio(strategy)
    aim = "<= 1.15" if paths == "two" else ""
    print(
        f"| Proxyless saved activations, {paths}, 20 draws | {step_mb:.1f} / {path_mb:.1f} MB: {ratio:.2f} | {aim} |"
    )

fresh = ModelSpace(SmallMobileNet())
begun = time.process_time()
cost = FlopsProfiler(fresh, torch.zeros(1, 1, 28, 28)).cost
build_s = time.process_time() - begun
random = np.random.default_rng(arguments.seed)
indices = np.stack(
    [random.integers(len(options), size=1_000_000) for options in cost.options.values()], axis=1
)
rate = len(indices) / statistics.median(
    seconds(lambda: cost.of_many(indices)) for _ in range(arguments.rounds)
)
print(f"| building the FLOPs cost of the default space | {build_s:.2f} s | < 2 s |")
print(f"| cost.of_many | {rate / 1e6:.1f} million architectures a second | >= 1 million |")
