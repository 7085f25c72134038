"""Measures a bundle on another machine over ssh, by the system's OpenSSH.

The device needs an ssh server, a POSIX shell and a Python with numpy and onnxruntime; neither sftp nor tar.
What it is sent lies in ``~/.cache/hwnas``, named by the manifest's digest: a run that was cut off on either
side goes on with what is measured there.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lookup_tables.progress import Progress
from lookup_tables.runner import MANIFEST, RESULTS, RUNNER, manifest_digest, read_manifest
from lookup_tables.whole_file import write_whole

_LEAST_PYTHON = [3, 8]

# The first value of an option counts, and the user's come first.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")

# What the device is asked: its Python, what that lacks, and whether the bundle is there already.
_PROBE = """
import importlib.util, json, os, sys
lacks = [name for name in sys.argv[2:] if importlib.util.find_spec(name) is None]
there = os.path.exists(os.path.join(sys.argv[1], "manifest.json"))
print(json.dumps({"python": list(sys.version_info[:2]), "lacks": lacks, "there": there}))
"""
# Takes an archive from standard input. The manifest is its last file: where that is, all is.
_UNPACK = """
import os, sys, tarfile
archive = tarfile.open(fileobj=sys.stdin.buffer, mode="r|")
for member in archive:
    path = os.path.join(sys.argv[1], member.name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".part", "wb") as file:
        file.write(archive.extractfile(member).read())
    os.replace(path + ".part", path)
"""
_REMOVE = "import shutil, sys; shutil.rmtree(sys.argv[1])"


@final
@dataclass(frozen=True)
class SshDevice:
    """A machine that is reached by ssh.

    Attributes:
        host: ``user@host``, or a name of the ssh configuration.
        port: None for what that configuration says.
        options: as after ``ssh -o``, such as ``IdentityFile=~/.ssh/pi``.
        python: which measures there; a path is relative to the home folder.

    >>> SshDevice.named("pi@raspberrypi:2222")
    SshDevice(host='pi@raspberrypi', port=2222, options=(), python='python3')
    """

    host: str
    port: int | None = None
    options: tuple[str, ...] = ()
    python: str = "python3"

    @classmethod
    def named(cls, name: str, options: Sequence[str] = (), python: str = "python3") -> SshDevice:
        """From ``user@host[:port]``; an IPv6 address with a port stands in brackets.

        Raises:
            ValueError: the name is not of that form.
        """
        found = re.fullmatch(
            r"(?:([^@\s-][^@\s]*)@)?(?:\[([^]\s]+)\]|([^\s:@\[\]-][^\s:@]*))(?::(\d+))?", name
        )
        if found is None:
            raise ValueError(f"a remote device is user@host[:port], such as pi@raspberrypi:22; got {name!r}")
        user, bracketed, plain, port = found.groups()
        host = bracketed or plain
        return cls(
            f"{user}@{host}" if user else host,
            int(port) if port else None,
            tuple(options),
            python.removeprefix("~/"),
        )

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` there, in the home folder."""
        options = [word for option in (*self.options, *_OPTIONS) for word in ("-o", option)]
        port = [] if self.port is None else ["-p", str(self.port)]
        return ["ssh", "-T", *options, *port, "--", self.host, shlex.join(words)]

    @property
    def profiles(self) -> bool:
        """Whether it can time parts inside networks."""
        return True

    def measure(self, folder: Path, progress: Progress) -> None:
        """Sends a bundle unless it is there, runs it, and brings ``results.jsonl`` into its folder.

        Raises:
            ValueError: the folder holds no bundle; the device cannot be logged in to without a question,
                lacks Python or a package, or its runner fails.
        """
        manifest = read_manifest(folder)
        there = _folder_there(folder)
        needs = sorted({"numpy", "onnxruntime", manifest["settings"]["runtime"]})
        facts = json.loads(_asked(self, self.python, "-c", _PROBE, there, *needs).splitlines()[-1])
        if facts["python"] < _LEAST_PYTHON:
            version = ".".join(map(str, facts["python"]))
            raise ValueError(
                f"'{self.python}' on {self.host} is Python {version}; 3.8 or newer is needed: name another "
                "one by --remote-python"
            )
        if facts["lacks"]:
            raise ValueError(
                f"'{self.python}' on {self.host} lacks {' and '.join(facts['lacks'])}; install there: "
                f"{self.python} -m pip install {' '.join(needs)}, or name another Python by --remote-python"
            )
        if not facts["there"]:
            _send(self, folder, [*manifest["files"], MANIFEST], progress)
        _run(self, there, progress)
        found = _asked(self, "cat", f"{there}/{RESULTS}")
        write_whole(folder / RESULTS, found[found.find("{") :])  # a login may greet

    def clean_up(self, folder: Path) -> None:
        """Removes the bundle and its results from the device."""
        _asked(self, self.python, "-c", _REMOVE, _folder_there(folder))


def _folder_there(folder: Path) -> str:
    digest = manifest_digest(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    return f".cache/hwnas/{digest[:16]}"


def _asked(device: SshDevice, *words: str) -> str:
    """What a command says there."""
    done = _started(device, words, stdin=subprocess.DEVNULL)
    said, errors = done.communicate()
    _check(device, done.returncode, errors.decode(errors="replace"))
    return said.decode()


def _send(device: SshDevice, folder: Path, names: Sequence[str], report: Progress) -> None:
    process = _started(device, (device.python, "-c", _UNPACK, _folder_there(folder)), stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        with process.stdin, tarfile.open(fileobj=process.stdin, mode="w|") as archive:
            for number, name in enumerate(names, start=1):
                content = (folder / name).read_bytes()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                report(f"sending to {device.host}", number, len(names))
    except BrokenPipeError:
        pass  # the device says why
    process.stdin = None
    errors = process.communicate()[1]
    _check(device, process.returncode, errors.decode(errors="replace"))


def _run(device: SshDevice, there: str, report: Progress) -> None:
    """Runs the runner, which ends soon after this process has: nobody reads its progress then."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            device.command(device.python, f"{there}/{RUNNER}", "--json"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):  # else a greeting
                    told = json.loads(line)
                    report(f"measuring on {device.host}", told["done"], told["total"])
        except BaseException:
            process.terminate()
            raise
        finally:
            process.stdout.close()
            code = process.wait()
        errors.seek(0)
        _check(device, code, errors.read().decode(errors="replace"))


def _started(device: SshDevice, words: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            device.command(*words), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise ValueError("there is no `ssh` on this machine; install OpenSSH's client") from None


def _check(device: SshDevice, code: int, errors: str) -> None:
    """Raises ``ValueError`` with what went wrong and what to do."""
    said = " ".join(errors.split())[-500:] or "nothing"
    if code == 255:  # ssh's own
        raise ValueError(
            f"no connection to {device.host}: {said}. `ssh {device.host}` must log in without a question: "
            "set up a key (ssh-copy-id), or say what it needs by --ssh-option; the same command then goes on"
        )
    if code in (126, 127):
        raise ValueError(
            f"there is no '{device.python}' on {device.host}: {said}; install Python 3.8 or newer there, or "
            "name it by --remote-python"
        )
    if code:
        raise ValueError(f"measuring on {device.host} failed: {said}; the same command goes on from here")
