from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hwnas import ModelSpace, ValueChoice
from hwnas.nn import Linear
from hwnas.subnet_export import loaded_subnet


def _space() -> ModelSpace:
    width = ValueChoice([2, 4], label="width")
    return ModelSpace(nn.Sequential(Linear(3, width), nn.ReLU(), Linear(width, 2)))


@pytest.mark.parametrize("width", [2, 4])
def test_supernet_with_choices_of_values_alone_hands_its_weights_to_every_subnet(
    width: int, tmp_path: Path
) -> None:
    trained = _space()  # its state dict has the names of its subnets'
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "last.ckpt")
    subnet = loaded_subnet(_space(), {"width": width}, tmp_path / "last.ckpt")
    inputs = torch.randn(4, 3)
    assert torch.equal(subnet(inputs), trained.freeze({"width": width})(inputs))


def test_weights_of_another_width_are_refused_by_their_shapes(tmp_path: Path) -> None:
    torch.save(_space().freeze({"width": 2}).state_dict(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="other shapes than this architecture"):
        loaded_subnet(_space(), {"width": 4}, tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]"])
def test_file_that_is_no_checkpoint_is_told_in_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no checkpoint that torch can load: \S[^\n]*$"):
        loaded_subnet(_space(), {"width": 4}, tmp_path / "last.ckpt")


def test_of_several_networks_of_equal_names_the_one_called_network_is_meant(tmp_path: Path) -> None:
    meant, other = _space().freeze({"width": 2}), _space().freeze({"width": 2})
    both = {"teacher": other, "network": meant}
    state = {f"{holder}.{name}": held for holder, n in both.items() for name, held in n.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    subnet = loaded_subnet(_space(), {"width": 2}, tmp_path / "last.ckpt")
    assert torch.equal(subnet.state_dict()["0.weight"], meant.state_dict()["0.weight"])
    renamed = {name.replace("network.", "student."): held for name, held in state.items()}
    torch.save({"state_dict": renamed}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"under \['student.', 'teacher.'\]: save the state dict of the one"):
        loaded_subnet(_space(), {"width": 2}, tmp_path / "last.ckpt")
