from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hwnas.recalibrate import recalibrate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1)).train()


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 4, 4, generator=generator) * (i + 1) + i for i, size in enumerate(sizes)]


def test_statistics_are_the_mean_over_the_batches() -> None:
    net, data = network(), batches(4, 8, 2)
    before = net[0].weight.clone()
    recalibrate(net, data)
    with torch.no_grad():
        seen = [net[0](batch) for batch in data]
    means = torch.stack([features.mean(dim=(0, 2, 3)) for features in seen]).mean(0)
    variances = torch.stack([features.var(dim=(0, 2, 3)) for features in seen]).mean(0)
    torch.testing.assert_close(net[1].running_mean, means)
    torch.testing.assert_close(net[1].running_var, variances)
    assert torch.equal(net[0].weight, before)


def test_what_was_there_before_has_no_part_in_it() -> None:
    fresh, used = network(), network()
    for batch in batches(3, 3, 3):
        used(batch * 100)
    data = batches(4)
    recalibrate(fresh, data)
    recalibrate(used, data)
    assert torch.equal(fresh[1].running_mean, used[1].running_mean)
    assert torch.equal(fresh[1].num_batches_tracked, used[1].num_batches_tracked)


def test_modes_and_momentum_come_back_also_after_an_error() -> None:
    def fail(batch: Tensor) -> None:
        assert net[1].training
        assert not net[2].training
        raise RuntimeError("of the user")

    net = network()
    net[3].eval()
    with pytest.raises(RuntimeError, match="of the user"):
        recalibrate(net, batches(2), fail)
    assert [module.training for module in net] == [True, True, True, False]
    assert net[1].momentum == 0.1


def test_a_batch_may_hold_targets_and_dropout_is_off() -> None:
    pairs = [(batch, torch.zeros(len(batch))) for batch in batches(4, 4)]
    state = torch.get_rng_state()
    one = recalibrate(network(), pairs)
    torch.set_rng_state(state)
    other = recalibrate(network(), batches(4, 4))
    assert torch.equal(one[1].running_var, other[1].running_var)  # type: ignore[index]


def test_own_step_runs_any_batch() -> None:
    net = network()
    recalibrate(net, [{"image": batch} for batch in batches(4, 4)], lambda batch: net(batch["image"]))
    expected = recalibrate(network(), batches(4, 4))
    assert torch.equal(net[1].running_mean, expected[1].running_mean)  # type: ignore[index]


def test_no_batch_is_refused_and_no_norm_needs_none() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(network(), [])
    recalibrate(nn.Linear(2, 2), [])


def test_norm_without_statistics_is_left_alone() -> None:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    recalibrate(norm, batches(2))
    assert norm.running_mean is None
    assert norm.training
