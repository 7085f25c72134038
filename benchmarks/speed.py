"""How fast a search is, beside plain PyTorch in one run: CPU time of one thread, medians of rounds.

Times an architecture step and a weight step of DARTS against two forward-backward passes over the same
candidates in plain PyTorch, and counts what Proxyless keeps for its backward pass against training one path:
on the default space, and on the same space with its largest widths fixed, which is what the plain version
runs. Then times the cost of the default space: building it, and summing it up for a million architectures.

    python benchmarks/speed.py [--rounds 25] [--batch 32] [--seed 0]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

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
parser.add_argument("--rounds", type=int, default=25)
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


class Speed:
    """One space with its steps."""

    def __init__(self, space: ModelSpace) -> None:
        self.space = space
        self.plain = PlainCandidates(space)
        self.darts = DARTS(seed=arguments.seed)
        self.darts.prepare_for(space)
        self.images = torch.randn(arguments.batch, 1, 28, 28)
        self.labels = torch.randint(10, (arguments.batch,))

    def loss(self, gates: Mapping[str, Gate]) -> Tensor:
        with self.space.running(gates):
            return F.cross_entropy(self.space(self.images), self.labels)

    def architecture_step(self) -> None:
        with kept_buffers(self.space), frozen_weights(self.space):
            loss = self.loss(self.darts.architecture_gates(torch.Generator()))
            torch.autograd.grad(loss, self.darts.logits.parameters(), allow_unused=True)

    def weight_step(self) -> None:
        self.loss(self.darts.weight_gates(torch.Generator())).backward()
        self.space.zero_grad()

    def plain_pass(self) -> None:
        F.cross_entropy(self.plain(self.images), self.labels).backward()
        self.plain.zero_grad()

    def step_times(self) -> Iterator[tuple[float, float, float, float]]:
        """CPU seconds of the two steps, a plain pass after each, after a warm-up."""
        order = (self.architecture_step, self.plain_pass, self.weight_step, self.plain_pass)
        for number in range(arguments.rounds + 1):
            row = tuple(map(seconds, order))
            if number:
                yield row

    def saved_bytes(self, gates: Mapping[str, Gate]) -> int:
        """Distinct storages kept for the backward pass, without parameters and buffers."""
        held = (*self.space.parameters(), *self.space.buffers())
        own = {tensor.untyped_storage().data_ptr() for tensor in held}
        found: dict[int, Tensor] = {}  # the tensors themselves: a freed address would be met again

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss(gates)
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    def saved_by(self, paths: Literal["two", "full"], draws: int = 20) -> tuple[float, float]:
        """MB kept by an architecture step, and by training the path that it picked: means over draws."""
        proxyless = Proxyless(paths, seed=arguments.seed)
        proxyless.prepare_for(self.space)
        steps, trained = [], []
        for draw in range(draws):
            gates = proxyless.architecture_gates(torch.Generator().manual_seed(arguments.seed + draw))
            with frozen_weights(self.space):
                steps.append(self.saved_bytes(gates) / 1e6)
            trained.append(
                self.saved_bytes({label: Gate(gate.picked) for label, gate in gates.items()}) / 1e6
            )
        return statistics.mean(steps), statistics.mean(trained)


def seconds(work: Callable[[], object]) -> float:
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


chosen = f"--rounds {arguments.rounds} --batch {arguments.batch} --seed {arguments.seed}"
print(
    f"{fingerprint().cpu}, {fingerprint().cores} cores, one thread; Python {platform.python_version()}, torch"
)
print(f"{torch.__version__}; images of 28x28; CPU seconds, medians of rounds:")
print(f"python benchmarks/speed.py {chosen}\n")
spaces = {
    "default space": ModelSpace(SmallMobileNet()),
    "widths fixed": ModelSpace(SmallMobileNet(widths=((24,), (48,), (96,)))),
}
print("| space | what | measured | aim |\n|---|---|---|---|")
for name, space in spaces.items():
    speed = Speed(space)
    rounds = list(speed.step_times())
    architecture_s, plain_s, weight_s, again_s = map(statistics.median, zip(*rounds, strict=True))
    plain_s += again_s
    low, _, high = statistics.quantiles([(a + w) / (p + q) for a, p, w, q in rounds])
    spread = f"half of the rounds {low:.2f} to {high:.2f}"
    print(f"| {name} | DARTS architecture step; weight step | {architecture_s:.3f} s; {weight_s:.3f} s | |")
    print(f"| {name} | two plain passes over all candidates | {plain_s:.3f} s | |")
    print(
        f"| {name} | DARTS step / two passes | {(architecture_s + weight_s) / plain_s:.2f} ({spread}) "
        "| <= 0.75 |"
    )
    for paths, aim in (("two", "<= 1.15"), ("full", "")):
        step_mb, path_mb = speed.saved_by(paths)  # type: ignore[arg-type]  # a tuple forgets the literals
        measured = f"{step_mb:.1f} / {path_mb:.1f} MB = {step_mb / path_mb:.2f}"
        print(f"| {name} | Proxyless saved activations, {paths}, 20 draws / one path | {measured} | {aim} |")

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
print(f"| default space | building the FLOPs cost | {build_s:.2f} s | < 2 s |")
print(f"| default space | cost.of_many | {rate / 1e6:.1f} million a second | >= 1 million |")
