import sys
from pathlib import Path

import pytest

from hwnas.data import Digits, FashionMNIST, arch_dataloader, describe, load_data, retrain_dataloader

USER_MODULE = '''
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class Plain(LightningDataModule):
    """States nothing about itself."""

    def __init__(self, batch_size=4):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.data = TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 5)

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.data, 6)

    test_dataloader = val_dataloader

class Floats(Plain):
    def setup(self, stage=None):
        self.data = TensorDataset(torch.randn(12, 3), torch.randn(12))

def seeded(seed, progress=None):
    data = Plain()
    data.seed = seed
    return data

made = Plain()
number = 7

def nothing():
    return None

class space:
    Inner = Plain
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the working directory."""
    (tmp_path / "my_data_module.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_data_module", raising=False)
    return "my_data_module"


def test_names_stand_for_the_data_that_we_have(tmp_path: Path) -> None:
    digits = load_data("digits", batch_size=7, seed=3)
    fashion = load_data("fashion-mnist", folder=tmp_path)
    assert isinstance(digits, Digits)
    assert (digits.batch_size, digits.seed) == (7, 3)
    assert isinstance(fashion, FashionMNIST)
    assert fashion.folder == tmp_path


def test_user_class_factory_and_instance_are_taken(user: str) -> None:
    plain = load_data(f"{user}:Plain", batch_size=3)
    assert type(plain).__name__ == "Plain"
    assert vars(plain)["batch_size"] == 3
    assert vars(load_data(f"{user}:seeded", seed=5))["seed"] == 5
    assert load_data(f"{user}:made") is load_data(f"{user}:made")
    assert type(load_data(f"{user}:space.Inner")).__name__ == "Plain"


@pytest.mark.parametrize("source", ["imagenet", "digits:", ":made", ""])
def test_unknown_name_lists_what_there_is(source: str) -> None:
    with pytest.raises(
        ValueError,
        match="there are fashion-mnist, digits, cifar10, cifar100, imagenet-folder, and my_module:my",
    ):
        load_data(source)


def test_module_that_cannot_be_imported_is_named(user: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be imported from .*No module named 'absent_module'"):
        load_data("absent_module:made")
    with pytest.raises(ValueError, match="has no 'Absent'"):
        load_data(f"{user}:Absent")


def test_attribute_that_is_no_data_module_is_refused(user: str) -> None:
    with pytest.raises(TypeError, match="it is a int"):
        load_data(f"{user}:number")
    with pytest.raises(TypeError, match="it returned a NoneType"):
        load_data(f"{user}:nothing")


def test_argument_that_the_data_does_not_take_is_refused(user: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'digits' takes no folder; leave it out"):
        load_data("digits", folder=tmp_path)
    with pytest.raises(ValueError, match="takes no folder or batch_size"):
        load_data(f"{user}:seeded", folder=tmp_path, batch_size=3)
    with pytest.raises(ValueError, match="is made already and takes no batch_size"):
        load_data(f"{user}:made", batch_size=3)


def test_facts_that_are_not_stated_are_found_in_the_batches(user: str) -> None:
    facts = describe(load_data(f"{user}:Plain"))
    assert (facts.name, facts.num_classes, facts.input_shape) == ("Plain", 5, (3, 8, 8))


def test_labels_that_are_no_whole_numbers_are_refused(user: str) -> None:
    with pytest.raises(TypeError, match="state both on the data module"):
        describe(load_data(f"{user}:Floats"))


def test_without_its_own_loaders_validation_serves_the_architecture_and_training_the_subnet(
    user: str,
) -> None:
    data = load_data(f"{user}:Plain", batch_size=2)
    data.setup("fit")
    assert [len(labels) for _, labels in arch_dataloader(data)] == [6, 6]
    assert [len(labels) for _, labels in retrain_dataloader(data)] == [2] * 6


def test_own_loaders_are_preferred() -> None:
    data = Digits(batch_size=10)
    assert len(list(arch_dataloader(data))) == 57  # 575 images
    assert len(list(retrain_dataloader(data))) == 115  # 1,150 images
