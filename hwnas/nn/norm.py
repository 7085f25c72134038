"""The normalisations of ``torch.nn`` whose width may be a value."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, final

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwnas.nn.mixed import ONE_PATH, MixedOperation, split, uninitialised
from hwnas.values import Value, outcomes


class _BatchNormalisation(MixedOperation, _BatchNorm, ABC):
    """What the BatchNorms share, in any number of dimensions."""

    elastic = ("num_features", "eps", "momentum")
    _plain: ClassVar[type[nn.Module]]

    def __init__(
        self,
        num_features: int | Value,
        eps: float | Value = 1e-5,
        momentum: float | Value | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        statistics: Literal["shared", "per_width"] = "shared",
        **keywords: Any,
    ) -> None:
        if statistics not in ("shared", "per_width"):
            raise ValueError(f"statistics must be 'shared' or 'per_width'; got {statistics!r}")
        given = {"num_features": num_features, "eps": eps, "momentum": momentum}
        fixed = {"affine": affine, "track_running_stats": track_running_stats, **keywords}
        values, largest = split(given, fixed)
        super().__init__(**largest)
        self.values = values
        self.statistics: Literal["shared", "per_width"] = statistics
        if self._has_own_statistics():
            for width in values["num_features"].all():
                # The largest width has those of the plain class.
                if width < self.num_features:
                    for name in ("running_mean", "running_var", "num_batches_tracked"):
                        buffer: Tensor = getattr(self, name)
                        own = buffer[:width] if buffer.ndim else buffer
                        self.register_buffer(f"{name}_{width}", own.clone())

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's own
        sizes = self.running_sizes()
        parts = self.parts(sizes)
        factor, count = sizes["momentum"], parts.get("num_batches_tracked")
        if self.training and self.track_running_stats and count is not None:
            count.add_(1)
            if factor is None:
                factor = 1.0 / float(count)
        keeps = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            parts.get("running_mean") if keeps else None,
            parts.get("running_var") if keeps else None,
            parts.get("weight"),
            parts.get("bias"),
            self.training or (self.running_mean is None and self.running_var is None),
            0.0 if factor is None else factor,
            sizes["eps"],
        )

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for name, buffer in self._buffers.items():
            if buffer is not None and name.startswith(("running_mean_", "num_batches_tracked_")):
                buffer.zero_()
            elif buffer is not None and name.startswith("running_var_"):
                buffer.fill_(1)

    def check_can_mix(self) -> None:
        for name in ("eps", "momentum"):
            if name in self.undecided():
                raise ValueError(f"options of {name} cannot be blended: fix it, or {ONE_PATH}")
        if self._has_own_statistics() and "num_features" in self.undecided():
            raise ValueError(
                "with statistics='per_width' a channel is normalised differently in every width, so that no "
                f"blended output holds them all: set statistics='shared', or {ONE_PATH}"
            )

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        fixed = {"affine": self.affine, "track_running_stats": self.track_running_stats}
        return uninitialised(type(self)._plain, **sizes, **fixed, **_without_bias(self))

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        width = sizes["num_features"]
        own = f"_{width}" if self._has_own_statistics() and width < self.num_features else ""
        found = {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": getattr(self, f"running_mean{own}"),
            "running_var": getattr(self, f"running_var{own}"),
        }
        parts = {name: tensor[:width] for name, tensor in found.items() if tensor is not None}
        if self.num_batches_tracked is not None:
            parts["num_batches_tracked"] = getattr(self, f"num_batches_tracked{own}")
        return parts

    def _has_own_statistics(self) -> bool:
        return self.statistics == "per_width" and self.track_running_stats and "num_features" in self.values


@final
class BatchNorm1d(_BatchNormalisation, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` whose channels may be a value; all else as in `BatchNorm2d`.

    Shapes: ``(N, num_features)`` or ``(N, num_features, L)`` to the same.
    """

    _plain = nn.BatchNorm1d


@final
class BatchNorm2d(_BatchNormalisation, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose channels may be a value; channels are taken from the front.

    Shapes: ``(N, num_features, H, W)`` to the same. ``eps`` and ``momentum`` may be values, too, where one
    path runs.

    Args:
        num_features, eps, momentum, affine, track_running_stats, keywords: as in ``torch.nn``.
        statistics: ``"shared"``: channel ``i`` has the same running mean and variance in every width that
            holds it; ``"per_width"``: every width has a set of its own, as in slimmable networks
            (arXiv 1812.08928, section 3.2, where weight and bias are private, too; here they are shared). A
            width that was never trained has mean 0 and variance 1. Whichever it is, recalibrate a subnet's
            statistics before it is judged (`hwnas.recalibrate`).
    """

    _plain = nn.BatchNorm2d


@final
class BatchNorm3d(_BatchNormalisation, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` whose channels may be a value; all else as in `BatchNorm2d`.

    Shapes: ``(N, num_features, D, H, W)`` to the same.
    """

    _plain = nn.BatchNorm3d


@final
class LayerNorm(MixedOperation, nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose shape may be a value; each axis is taken from the front.

    Shapes: ``(..., *normalized_shape)`` to the same. ``eps`` may be a value, too.

    For strategies that run one path. Under mixing weights an option's mean and variance are those of its own
    width, so that the widest output holds none of the others; their weighted sum would be masked again by
    what comes next. `check_can_mix` refuses it.
    """

    elastic = ("normalized_shape", "eps")

    def __init__(
        self,
        normalized_shape: int | Value | Sequence[int | Value],
        eps: float | Value = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        **keywords: Any,
    ) -> None:
        given = {"normalized_shape": normalized_shape, "eps": eps}
        values, largest = split(given, {"elementwise_affine": elementwise_affine, "bias": bias, **keywords})
        super().__init__(**largest)
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        sizes = self.running_sizes()
        parts = self.parts(sizes)
        return F.layer_norm(
            input, sizes["normalized_shape"], parts.get("weight"), parts.get("bias"), sizes["eps"]
        )

    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        sizes = super().sizes(chosen)
        shape = sizes["normalized_shape"]
        return {**sizes, "normalized_shape": (shape,) if isinstance(shape, int) else tuple(shape)}

    def check_can_mix(self) -> None:
        for name, value in self.undecided().items():
            raise ValueError(
                f"LayerNorm's mean and variance are those of the picked {name}, so that no blended output "
                f"holds all of {value.all()}: fix it and mix widths that are not normalised (the hidden one "
                f"of an MLP), choose between whole blocks with a LayerChoice, or {ONE_PATH}"
            )

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        bias = self.elementwise_affine and self.bias is not None
        return nn.LayerNorm(**sizes, elementwise_affine=self.elementwise_affine, bias=bias, device="meta")

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        cut = tuple(map(slice, sizes["normalized_shape"]))
        held = {"weight": self.weight, "bias": cast("Tensor | None", self.bias)}
        return {name: tensor[cut] for name, tensor in held.items() if tensor is not None}


@final
class GroupNorm(MixedOperation, nn.GroupNorm):
    """``torch.nn.GroupNorm`` whose groups and channels may be values; channels are taken from the front.

    Shapes: ``(N, num_channels, *)`` to the same. ``eps`` may be a value, too, where one path runs.

    Under mixing weights the channels of a group must stay the same in every width: ``num_groups`` follows
    ``num_channels``, as in ``GroupNorm(width // 8, width)``. Then each group is normalised by itself, and the
    widest output holds all others; else `check_can_mix` refuses it.

    Raises:
        ValueError: channels that groups do not divide under some option.
    """

    elastic = ("num_groups", "num_channels", "eps")

    def __init__(
        self,
        num_groups: int | Value,
        num_channels: int | Value,
        eps: float | Value = 1e-5,
        affine: bool = True,
        **keywords: Any,
    ) -> None:
        given = {"num_groups": num_groups, "num_channels": num_channels, "eps": eps}
        values, largest = split(given, {"affine": affine, **keywords})
        for sizes in ({**largest, **outcome} for outcome in outcomes(values)):
            if sizes["num_channels"] % sizes["num_groups"]:
                raise ValueError(
                    "num_channels must be divisible by num_groups in every combination of options; "
                    f"got {sizes['num_channels']} and {sizes['num_groups']}"
                )
        # The largest of both need not divide.
        super().__init__(**{**largest, "num_groups": 1})
        self.num_groups = largest["num_groups"]
        self.values = values

    def forward(self, input: Tensor) -> Tensor:
        if not self.values:
            return super().forward(input)
        sizes = self.running_sizes()
        parts = self.parts(sizes)
        return F.group_norm(input, sizes["num_groups"], parts.get("weight"), parts.get("bias"), sizes["eps"])

    def check_can_mix(self) -> None:
        if "eps" in self.undecided():
            raise ValueError(f"options of eps cannot be blended: fix it, or {ONE_PATH}")
        every = [self.sizes(outcome) for outcome in outcomes(self.values)]
        pairs = sorted({(sizes["num_groups"], sizes["num_channels"]) for sizes in every})
        if len({channels / groups for groups, channels in pairs}) > 1:
            raise ValueError(
                "a group's mean and variance are those of its channels, which must stay the same under every "
                f"option; got (num_groups, num_channels) {pairs}. Let num_groups follow num_channels "
                "(GroupNorm(width // 8, width)), choose between whole layers with a LayerChoice, or "
                f"{ONE_PATH}"
            )

    def plain(self, sizes: Mapping[str, Any]) -> nn.Module:
        return nn.GroupNorm(**sizes, affine=self.affine, **_without_bias(self), device="meta")

    def parts(self, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        held = {"weight": self.weight, "bias": cast("Tensor | None", self.bias)}
        return {n: tensor[: sizes["num_channels"]] for n, tensor in held.items() if tensor is not None}


def _without_bias(norm: _BatchNorm | nn.GroupNorm) -> dict[str, Any]:
    # Newer torch alone knows this argument.
    return {"bias": False} if norm.affine and cast("Tensor | None", norm.bias) is None else {}
