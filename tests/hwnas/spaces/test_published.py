from __future__ import annotations

from typing import Any, ClassVar

import pytest
from torch import Tensor, nn
from typer.testing import CliRunner

from hwnas import LayerChoice
from hwnas.cli import app
from hwnas.spaces import SPACES, FBNet, Published, conformance
from hwnas.spaces.published import known_as, published_network


class Net(nn.Module):
    """Its "point" network has 3 * 4 * 16 multiply-adds in the convolution and 4 * classes in the head."""

    published: ClassVar[dict[str, Published]] = {
        "point": Published({"op": "point"}, (3, 4, 4), 192 + 40, 12 + 4 + 40 + 10, "232", "this file"),
        "wrong": Published({"op": "skip"}, (3, 4, 4), 1, 1, "1", "nowhere", note="never true"),
    }

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.op = LayerChoice({"point": nn.Conv2d(in_channels, 4, 1), "skip": nn.Identity()}, label="op")
        self.head = nn.LazyLinear(num_classes) if in_channels == 0 else nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.op(images).mean((2, 3)))
        return scores


def test_a_published_network_is_frozen_and_counted() -> None:
    assert published_network(Net, "point", {"num_classes": 2}).head.out_features == 2
    assert conformance("net", Net, "point").is_equal


def test_the_command_shows_what_is_equal_and_fails_where_something_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only: dict[str, Any] = {"net": type("Only", (Net,), {"published": {"point": Net.published["point"]}})}
    monkeypatch.setattr("hwnas.spaces.SPACES", only)
    shown = CliRunner().invoke(app, ["spaces", "check"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "232" in shown.output
    changed = Published({"op": "point"}, (3, 4, 4), 233, 66, "233", "nowhere", note="never true")
    monkeypatch.setattr(only["net"], "published", {"point": changed})
    shown = CliRunner().invoke(app, ["spaces", "check"], env={"COLUMNS": "200"})
    assert shown.exit_code == 1
    assert "233 and 66" in shown.output
    assert "never true" in shown.output


def test_every_ready_made_space_has_a_small_size_and_a_list_of_published_networks() -> None:
    for name, space in SPACES.items():
        assert isinstance(space.small(num_classes=3, in_channels=1), space), name
        assert set(space.published) == {known.lower() for known in space.published}


@pytest.mark.parametrize(
    ("space", "said", "meant"),
    [
        ("proxylessnas", "proxyless_mobile_14", "mobile-14"),
        ("proxylessnas", "ProxylessNAS-GPU", "gpu"),
        ("fbnet", "FBNet-A", "a"),
        ("fbnet", "fbnet_c", "c"),
        ("mobilenet-v3", "MobileNetV3-Large", "large"),
        ("mobilenet-v3", "mobilenet_v3_small", "small"),
        ("mobilenet-v3", "ofa-595M", "ofa-595m"),
        ("darts-cells", "DARTS_V2", "darts-v2"),
        ("darts-cells", "v2-imagenet", "darts-v2-imagenet"),
        ("shufflenet-v2", "SPOS", "spos"),
        ("autoformer", "AutoFormer-T", "t"),
        ("enas-micro", "ENAS-micro", "micro"),
    ],
)
def test_names_are_known_in_the_spelling_of_papers_and_files(space: str, said: str, meant: str) -> None:
    assert known_as(SPACES[space], said) == meant


@pytest.mark.parametrize("name", ["f", "fa", "d", "net-a", "proxyless", ""])
def test_another_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"FBNet has no published network '{name}'; it has a, b, c"):
        FBNet.from_published(name)
