import gzip
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.data import FashionMNIST
from hwnas.data import fashion_mnist as module
from hwnas.data.fashion_mnist import DEBIAN_FOLDER, cache_folder, find_files, parse_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10
CONTENT = {
    f"{part}-{kind}": bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    for part in ("train", "t10k")
    for kind, array in (("images-idx3-ubyte", IMAGES), ("labels-idx1-ubyte", LABELS))
}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
DAMAGED = "train-images-idx3-ubyte"


def write_files(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENT.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def find(tmp_path: Path, folder: Path | None = None, **places: Any) -> dict[str, bytes]:
    """``find_files`` with every place in ``tmp_path``; those not named are empty."""
    nowhere = {"debian_folder": tmp_path / "debian", "urls": (), "debian_package": "no-such-package"}
    return find_files(folder, cache=tmp_path / "cache", sha256=SHA256, **(nowhere | places))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which its files can be downloaded."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    folder = write_files(tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_tools(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No apt-get, unless a test brings its own: nothing here asks the network."""
    if "real" not in request.node.name:
        monkeypatch.setenv("PATH", "")


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nexport PATH=/bin:/usr/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for apt-get and dpkg-deb: download works once lists of our own were fetched."""
    files, bin_folder = write_files(tmp_path / "package"), tmp_path / "bin"
    bin_folder.mkdir()
    tool(
        bin_folder,
        "apt-get",
        'case "$*" in\n'
        "*Dir::State::Lists*update) touch updated; echo 'E: one archive is unreachable' >&2; exit 100;;\n"
        f'*download*) test -e updated && touch fashion_1_all.deb && echo "$*" >{tmp_path}/asked'
        " || { echo 'E: Unable to locate package' >&2; exit 100; };;\nesac",
    )
    target = DEBIAN_FOLDER.relative_to("/")
    tool(bin_folder, "dpkg-deb", f'mkdir -p "$3/{target}" && cp {files}/* "$3/{target}"')
    monkeypatch.setenv("PATH", str(bin_folder))
    return files


def test_given_folder_comes_first(tmp_path: Path) -> None:
    write_files(tmp_path / "cache")
    truncate(tmp_path / "cache" / f"{DAMAGED}.gz")
    assert find(tmp_path, write_files(tmp_path / "mine")) == CONTENT


def test_files_may_lie_unpacked(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    assert find(tmp_path, tmp_path) == CONTENT


def test_cache_comes_before_debian_files(tmp_path: Path) -> None:
    write_files(tmp_path / "cache")
    truncate(write_files(tmp_path / "debian") / f"{DAMAGED}.gz")
    assert find(tmp_path) == CONTENT


def test_debian_files_come_before_download_and_are_not_copied(
    tmp_path: Path, served: tuple[Path, str]
) -> None:
    write_files(tmp_path / "debian")
    assert find(tmp_path, urls=(served[1],)) == CONTENT
    assert not (tmp_path / "cache").exists()


def test_download_fills_the_cache_and_reports_progress(tmp_path: Path, served: tuple[Path, str]) -> None:
    told: list[tuple[str, int, int]] = []
    assert find(tmp_path, urls=(served[1],), progress=lambda *step: told.append(step)) == CONTENT
    assert {(what, done == total) for what, done, total in told} == {
        (f"download {n}.gz", True) for n in CONTENT
    }
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(f"{name}.gz" for name in CONTENT)


def test_download_goes_on_with_what_the_cache_lacks(tmp_path: Path, served: tuple[Path, str]) -> None:
    folder, url = served
    last = folder / f"{list(CONTENT)[-1]}.gz"
    last.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="404"):
        find(tmp_path, urls=(url,))
    (tmp_path / "away").rename(last)
    told: list[str] = []
    find(tmp_path, urls=(url,), progress=lambda what, *_: told.append(what))
    assert set(told) == {f"download {last.name}"}


def test_damaged_download_is_refused_and_the_next_address_tried(
    tmp_path: Path, served: tuple[Path, str]
) -> None:
    folder, url = served
    shutil.copytree(folder, folder / "bad")
    truncate(folder / "bad" / f"{DAMAGED}.gz")
    with pytest.raises(FileNotFoundError, match=f"{DAMAGED}.gz is damaged"):
        find(tmp_path, urls=(f"{url}/bad",))
    assert find(tmp_path, urls=(f"{url}/bad", url)) == CONTENT


def test_truncated_file_in_the_cache_is_replaced(tmp_path: Path, served: tuple[Path, str]) -> None:
    path = write_files(tmp_path / "cache") / f"{DAMAGED}.gz"
    truncate(path)
    assert find(tmp_path, urls=(served[1],)) == CONTENT
    assert gzip.decompress(path.read_bytes()) == CONTENT[DAMAGED]


@pytest.mark.parametrize(
    "content",
    [gzip.compress(CONTENT[DAMAGED])[:100], gzip.compress(b"other"), b"", b"\x1f\x8b\0"],
    ids=["cut off", "other content", "empty", "a header"],  # gzip writes the time
)
def test_damaged_file_in_the_users_folder_is_an_error_and_stays(tmp_path: Path, content: bytes) -> None:
    path = write_files(tmp_path / "mine") / f"{DAMAGED}.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{DAMAGED}.gz is damaged.*remove or replace it"):
        find(tmp_path, tmp_path / "mine")
    assert path.read_bytes() == content


def test_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must exist"):
        find(tmp_path, tmp_path / "nowhere")


def test_package_is_fetched_where_lists_are_missing(tmp_path: Path, debian: Path) -> None:
    assert find(tmp_path, debian_package="fashion") == CONTENT
    assert "Dir::State::Lists" in (tmp_path / "asked").read_text()
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(f"{name}.gz" for name in CONTENT)


def test_files_of_another_package_version_are_refused(tmp_path: Path, debian: Path) -> None:
    truncate(debian / f"{DAMAGED}.gz")
    with pytest.raises(FileNotFoundError, match=f"{DAMAGED}.gz is damaged"):
        find(tmp_path, debian_package="fashion")


def test_every_place_that_failed_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        find(tmp_path, tmp_path / "mine", urls=("http://127.0.0.1:9",))
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "folder",
        "cache",
        "Debian's",
        "download",
        "Debian's",
    ]
    assert "Connection refused" in lines[4]
    assert "not a Debian system" in lines[5]
    assert "apt-get install no-such-package" in lines[-1]


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, served: tuple[Path, str]) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(FileNotFoundError, match="HWNAS_CACHE"):
        find(tmp_path, urls=(served[1],))


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "fashion-mnist"
    monkeypatch.delenv("HWNAS_CACHE")
    assert "hwnas" in cache_folder().parts


def test_interrupted_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        module._keep(b"content", tmp_path / "cache" / "file")
    assert os.listdir(tmp_path / "cache") == []


def test_leftovers_of_killed_runs_are_cleared(tmp_path: Path) -> None:
    old, young = tmp_path / ".partial-old", tmp_path / ".partial-young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    module._keep(b"content", tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == [".partial-young", "file"]


def test_idx_round_trip() -> None:
    assert torch.equal(parse_idx(CONTENT["train-images-idx3-ubyte"], axes=3), torch.from_numpy(IMAGES))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (CONTENT["train-labels-idx1-ubyte"], "must start with 00000803, got 00000801"),
        (b"\0\0\x08\x03\0", "must start with"),
        (CONTENT["train-images-idx3-ubyte"][:-1], r"shape \(20, 28, 28\) must hold 15680 values, got 15679"),
        (CONTENT["train-images-idx3-ubyte"] + b"\0", "got 15681"),
    ],
)
def test_idx_of_another_form_is_refused(content: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_idx(content, axes=3)


def test_module_yields_what_the_files_hold(tmp_path: Path) -> None:
    data = FashionMNIST(write_files(tmp_path), batch_size=4, augmentation=None, sha256=SHA256)
    images, labels = next(iter(data.test_dataloader()))
    torch.testing.assert_close(images * data.std[0] + data.mean[0], torch.from_numpy(IMAGES)[:, None] / 255)
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.slow
def test_real_files_have_the_stated_mean_and_deviation() -> None:
    places = (cache_folder(), DEBIAN_FOLDER)
    folder = next((place for place in places if (place / "train-images-idx3-ubyte.gz").is_file()), None)
    if folder is None:
        pytest.skip(f"the real files are in none of {', '.join(map(str, places))}")
    data = FashionMNIST(folder)
    train, test = data.load()
    pixels = train.pixels.double() / 255
    assert (len(train), len(test), [len(part) for part in data.parts()]) == (
        60_000,
        10_000,
        [27_000, 27_000, 6_000],
    )
    assert pixels.mean() == pytest.approx(data.mean[0], abs=5e-5)
    assert pixels.std() == pytest.approx(data.std[0], abs=5e-5)
    assert train.labels.bincount().tolist() == [6_000] * 10
