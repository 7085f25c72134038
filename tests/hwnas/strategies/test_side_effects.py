from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import nn

from hwnas.strategies.side_effects import (
    frozen_weights,
    kept_buffers,
    own_random_numbers,
    random_states,
    set_random_states,
)
from tests.hwnas.strategies.tiny import assert_equal


def test_frozen_weights_ask_again_afterwards_but_not_those_the_user_froze() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    inside = []
    with contextlib.suppress(KeyError), frozen_weights(module):
        inside += [parameter.requires_grad for parameter in module.parameters()]
        raise KeyError
    assert not any(inside)
    assert [parameter.requires_grad for parameter in module.parameters()] == before


def test_buffers_come_back_written_to_and_replaced() -> None:
    norm = nn.BatchNorm1d(2)
    mean, variance = norm.running_mean, norm.running_var
    with contextlib.suppress(KeyError), kept_buffers(norm):
        norm(torch.randn(4, 2))
        norm.running_var = torch.full((2,), 9.0)
        raise KeyError
    assert norm.running_mean is mean
    assert norm.running_var is variance
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.running_var.tolist() == [1, 1]


def test_own_random_numbers_depend_on_the_seed_and_leave_no_trace() -> None:
    before = random_states()
    draws = []
    for seed in (1, 2, 1):
        with own_random_numbers(seed):
            draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[2] != draws[1]
    assert_equal(random_states(), before)


def test_random_states_bring_the_next_numbers_back() -> None:
    np.random.randn()  # numpy keeps the second of a pair
    states = random_states()
    first = random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()
    set_random_states(states)
    assert first == (random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist())
