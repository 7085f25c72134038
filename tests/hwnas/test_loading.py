"""Spaces are found by name or path, and what cannot be found is told with what there is."""

from __future__ import annotations

import pytest
from torch import nn

from hwnas import ModelSpace
from hwnas.loading import imported, load_space
from tests.hwnas.tiny_space import TinyNet


class Plain(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_channels, num_classes)


def made_space(num_classes: int, in_channels: int) -> ModelSpace:
    return ModelSpace(TinyNet(num_classes, in_channels))


def no_module(num_classes: int, in_channels: int) -> str:
    return "network"


@pytest.mark.parametrize("name", ["tests.hwnas.tiny_space:TinyNet", f"{__name__}:made_space"])
def test_class_and_function_make_a_space_for_the_data(name):
    space = load_space(name, num_classes=7, in_channels=3)
    assert space.network.classifier.out_features == 7
    assert space.network.stem[0].weight.shape[1] == 3


def test_ready_made_space_is_found_by_name():
    assert load_space("small-mobilenet", 10, 1).size > 1


def test_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "module_of_the_user.py").write_text("class Kept:\n    value = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # so that the path is put back afterwards
    assert imported("module_of_the_user:Kept.value", "data") == 3


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "nope",
            ValueError,
            r"unknown space 'nope'; there are .*small-mobilenet.*NAME:small.* and my_module:MyNetwork",
        ),
        ("no_such_module:Net", ValueError, "space 'no_such_module:Net' cannot be imported from"),
        ("tests.hwnas.tiny_space:Nope", ValueError, "'tests.hwnas.tiny_space' .* has no 'Nope'"),
        (f"{__name__}:no_module", TypeError, r"must make a torch.nn.Module; it made a str"),
        (f"{__name__}:Plain", ValueError, "choice"),
    ],
)
def test_what_is_no_space_is_told(name, error, text):
    with pytest.raises(error, match=text):
        load_space(name, 10, 1)
