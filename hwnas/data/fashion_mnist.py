"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28×28, ten classes (arXiv 1708.07747, MIT)."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

from hwnas.data.images import Augmentation, ImageData, Images
from lookup_tables.progress import Progress

# Sums of the files' *content*: Debian's gzip headers differ from the official ones (no name, no date),
# what they hold does not.
SHA256: Mapping[str, str] = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# What the project's README links to, and its repository; neither is trusted, the sums are.
URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TIMEOUT_S = 10
# More than any of the files: who answers in the place of a server cannot fill the memory.
LARGEST_BYTES = 64 << 20


class FashionMNIST(ImageData):
    """Fashion-MNIST: 27,000 images for weights, 27,000 for the architecture, 6,000 to select on.

    The files are taken from the first place that has all four, checked by sha256 whatever the place:
    ``folder``, the cache (``cache_folder()``), the Debian package's files, the official download into the
    cache, and on Debian systems the package fetched and unpacked into the cache, for which no rights are
    needed.

    Args:
        folder: where the files lie, as ``train-images-idx3-ubyte`` and so on, with or without ``.gz``.
        batch_size: images in a training batch.
        eval_batch_size: images in a batch of validation and test.
        fractions: shares of the 60,000 for weights, architecture and selection.
        seed: of split, order and augmentation.
        augmentation: of training images; None for none.
        num_workers: processes that prepare batches.
        progress: told about downloads: what, bytes done, bytes in all.
        sha256: name and sum of the content of the four files.

    Raises:
        FileNotFoundError: when read, if no place has the files; names each with its reason.
        ValueError: when read, if a file in ``folder`` is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        fractions: tuple[float, float, float] = (0.45, 0.45, 0.1),
        seed: int = 0,
        augmentation: Augmentation | None = Augmentation(),
        num_workers: int = 0,
        progress: Progress | None = None,
        sha256: Mapping[str, str] = SHA256,
    ) -> None:
        super().__init__(
            name="fashion-mnist",
            num_classes=10,
            input_shape=(1, 28, 28),
            mean=(0.2860,),
            std=(0.3530,),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            fractions=fractions,
            seed=seed,
            augmentation=augmentation,
            num_workers=num_workers,
            progress=progress,
        )
        self.folder = None if folder is None else Path(folder)
        self.sha256 = sha256

    def load(self) -> tuple[Images, Images]:
        content = find_files(self.folder, sha256=self.sha256, progress=self.progress)
        return (
            _labelled(content["train-images-idx3-ubyte"], content["train-labels-idx1-ubyte"]),
            _labelled(content["t10k-images-idx3-ubyte"], content["t10k-labels-idx1-ubyte"]),
        )


def cache_folder() -> Path:
    """Where downloads are kept: ``$HWNAS_CACHE/fashion-mnist``, else the user's cache folder for hwnas."""
    root = os.environ.get("HWNAS_CACHE") or platformdirs.user_cache_dir("hwnas")
    return Path(root) / "fashion-mnist"


@dataclass(frozen=True)
class _Source:
    """One place to look: ``read`` returns the content of all four files or raises ``_Missing``."""

    name: str
    read: Callable[[], dict[str, bytes]]


class _Missing(Exception):
    """A place does not have the files; the text is the reason."""


class _Damaged(Exception):
    """A file is there and its content is not what it must be; the text says which and what is wrong."""


def find_files(
    folder: Path | None = None,
    *,
    cache: Path | None = None,
    debian_folder: Path = DEBIAN_FOLDER,
    urls: tuple[str, ...] = URLS,
    debian_package: str = DEBIAN_PACKAGE,
    sha256: Mapping[str, str] = SHA256,
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """The unpacked content of every file named in ``sha256``, from the first place that has them all.

    Raises:
        FileNotFoundError: no place has them; every place is named with its reason.
        ValueError: a file in ``folder`` is damaged, or ``folder`` is no folder.
    """
    cache = cache or cache_folder()
    sources = [
        _Source(f"cache {cache}", lambda: _read_cache(cache, sha256)),
        _Source(f"Debian's files {debian_folder}", lambda: _read_folder(debian_folder, sha256)),
        *(
            _Source(f"download {url}", lambda url=url: _download(url, cache, sha256, progress))  # type: ignore[misc]
            for url in urls
        ),
        _Source(
            f"Debian's package {debian_package}",
            lambda: _fetch_package(debian_package, cache, sha256, progress),
        ),
    ]
    if folder is not None:
        sources.insert(0, _Source(f"folder {folder}", lambda: _read_given(folder, sha256)))
    reasons = []
    for source in sources:
        try:
            return source.read()
        except (_Missing, _Damaged) as error:
            reasons.append(f"  {source.name}: {error}")
    raise FileNotFoundError(
        "Fashion-MNIST was found nowhere:\n"
        + "\n".join(reasons)
        + f"\nInstall Debian's package (apt-get install {debian_package}), or put the files "
        + ", ".join(f"{name}.gz" for name in sha256)
        + f" into {cache} or into a folder of yours that you name. What was downloaded whole is kept: "
        "run again to go on."
    )


def _read_given(folder: Path, sha256: Mapping[str, str]) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ValueError(f"the Fashion-MNIST folder must exist, but {folder} is no folder")
    try:
        return _read_folder(folder, sha256)
    except _Damaged as error:
        raise ValueError(
            f"{error}; remove or replace it, the user's own files are never overwritten"
        ) from error


def _read_folder(folder: Path, sha256: Mapping[str, str]) -> dict[str, bytes]:
    return {name: _read(folder, name, digest) for name, digest in sha256.items()}


def _read_cache(cache: Path, sha256: Mapping[str, str]) -> dict[str, bytes]:
    """As ``_read_folder``; a damaged file is removed, so that it is fetched again."""
    content, damaged = {}, []
    for name, digest in sha256.items():
        try:
            content[name] = _read(cache, name, digest)
        except _Damaged as error:
            damaged.append(f"{error} (removed)")
            for path in (cache / name, cache / f"{name}.gz"):
                path.unlink(missing_ok=True)
    if damaged:
        raise _Missing("; ".join(damaged))
    return content


def _read(folder: Path, name: str, sha256: str) -> bytes:
    for path in (folder / f"{name}.gz", folder / name):
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _Missing(f"{path} cannot be read: {error.strerror}") from error
        return _checked(stored, sha256, str(path))
    raise _Missing(f"no {name}.gz")


def _checked(stored: bytes, sha256: str, name: str) -> bytes:
    """The content of a file, unpacked where it is packed, once its sum is right."""
    try:
        packed = stored[:2] == b"\x1f\x8b"
        content = gzip.GzipFile(fileobj=io.BytesIO(stored)).read(LARGEST_BYTES) if packed else stored
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Damaged(f"{name} is damaged: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _Damaged(f"{name} is damaged: sha256 of its content must be {sha256}, is {found}")
    return content


def _keep(stored: bytes, path: Path) -> None:
    """Write a file as a whole or not at all, whoever else writes it at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".partial-*"):  # of runs that were killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(stored)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _Missing(
            f"{path} cannot be written: {error.strerror}; name another folder by HWNAS_CACHE"
        ) from error


def _download(
    url: str, cache: Path, sha256: Mapping[str, str], progress: Progress | None
) -> dict[str, bytes]:
    """Fetch what the cache lacks into it, file by file: what is there already is not fetched again."""
    content = {}
    for name, digest in sha256.items():
        try:
            content[name] = _read(cache, name, digest)
        except (_Missing, _Damaged):
            stored = _fetch(f"{url}/{name}.gz", progress)
            content[name] = _checked(stored, digest, f"{url}/{name}.gz")
            _keep(stored, cache / f"{name}.gz")
    return content


def _fetch(url: str, progress: Progress | None) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "hwnas"})
    stored = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            total = int(answer.headers.get("Content-Length", 0))
            while len(stored) < LARGEST_BYTES and (chunk := answer.read(1 << 18)):
                stored += chunk
                if progress is not None:
                    progress(f"download {url.rsplit('/', 1)[1]}", len(stored), max(total, len(stored)))
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise _Missing(f"{url}: {error}") from error
    if len(stored) < total:
        raise _Missing(f"{url}: the connection ended after {len(stored)} of {total} bytes")
    return bytes(stored)


def _fetch_package(
    package: str, cache: Path, sha256: Mapping[str, str], progress: Progress | None
) -> dict[str, bytes]:
    """Fetch Debian's package and keep its files in the cache; needs neither root nor package lists."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise _Missing(f"no {tool} here: not a Debian system")
    with tempfile.TemporaryDirectory(prefix="hwnas-") as name:
        folder = Path(name)
        if progress is not None:
            progress(f"apt-get download {package}", 0, 1)
        archive = _apt_download(package, folder)
        _run(["dpkg-deb", "-x", str(archive), str(folder / "unpacked")], folder)
        unpacked = folder / "unpacked" / DEBIAN_FOLDER.relative_to("/")
        content = _read_folder(unpacked, sha256)
        for file in sha256:
            _keep((unpacked / f"{file}.gz").read_bytes(), cache / f"{file}.gz")
        if progress is not None:
            progress(f"apt-get download {package}", 1, 1)
    return content


def _apt_download(package: str, folder: Path) -> Path:
    """Download with the system's package lists; where those are absent or stale, with lists of our own."""
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    # Who may write here is this user alone: apt's own download user, which root would switch to, may not.
    apt = ["apt-get", "-q", "-o", f"APT::Sandbox::User={_user()}"]
    own = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    try:
        _run([*apt, "download", package], folder)
    except _Missing:
        try:
            _run([*apt, *own, "update"], folder)
        except _Missing as error:
            update = f"; before it {error}"  # one unreachable archive of several does no harm
        else:
            update = ""
        try:
            _run([*apt, *own, "download", package], folder)
        except _Missing as error:
            raise _Missing(f"{error}{update}") from error
    archives = list(folder.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        raise _Missing(f"apt-get download {package} left {len(archives)} packages, not one")
    return archives[0]


def _user() -> str:
    import pwd  # Unix only, as apt is

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "root"  # a user without a name is not root, and apt switches users for root alone


def _run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.startswith("E:")] or [error.stderr.strip()]
        raise _Missing(f"{' '.join(command)} failed ({error.returncode}): {' '.join(said)}") from error
    except subprocess.TimeoutExpired as error:
        raise _Missing(f"{' '.join(command)} did not end within {error.timeout:.0f} seconds") from error


def parse_idx(content: bytes, axes: int) -> Tensor:
    """An array of unsigned bytes in the IDX format, as a uint8 tensor.

    The format (http://yann.lecun.com/exdb/mnist/): two zero bytes, the type (8: unsigned byte), the number
    of axes, each size as a big-endian 32-bit integer, the values.

    Raises:
        ValueError: another type or number of axes, or too few or too many values.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]), axes=1)
    tensor([7, 8, 9], dtype=torch.uint8)
    """
    magic, head = bytes([0, 0, 8, axes]), 4 + 4 * axes
    if content[:4] != magic or len(content) < head:
        raise ValueError(
            f"an IDX file of bytes with {axes} axes must start with {magic.hex()}, got {content[:4].hex()}"
        )
    shape = np.frombuffer(content, ">u4", axes, offset=4).astype(np.int64)
    if len(content) - head != shape.prod():
        raise ValueError(
            f"an IDX file of shape {tuple(shape.tolist())} must hold {shape.prod()} values, "
            f"got {len(content) - head}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy())


def _labelled(images: bytes, labels: bytes) -> Images:
    return Images(parse_idx(images, axes=3).unsqueeze(1), parse_idx(labels, axes=1).long())
