"""A device that is reached by ssh: here an sshd of our own on this machine's loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from hwnas import LayerChoice
from lookup_tables import LookupTable, SshDevice, bundle, fingerprint
from lookup_tables.bundle import runner_script
from tests.lookup_tables.test_bundle import bundled, small_models  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[2]


# ---- the server


@dataclass
class Sshd:
    """A server, and what a client needs to get in; ``home`` is where it puts who logs in."""

    home: Path
    port: int
    options: list[str]

    def device(self, python: str = sys.executable) -> SshDevice:
        return SshDevice.named(f"{user()}@127.0.0.1:{self.port}", self.options, python)

    def results(self) -> Path | None:
        return next(self.home.glob(".cache/hwnas/*/results.jsonl"), None)


def user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def server_program(cache: Path) -> Path:
    """The system's sshd, or Debian's, unpacked into the cache without installing it."""
    if found := shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"):
        return Path(found).resolve()
    unpacked = cache / "unpacked"
    if not unpacked.exists():
        if shutil.which("apt-get") is None:
            pytest.skip("no sshd, and no apt-get to fetch Debian's openssh-server")
        fetch = ["apt-get", "download", "openssh-server", "libwrap0"]
        done = subprocess.run(fetch, cwd=cache, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.skip(f"no sshd, and openssh-server cannot be fetched: {done.stderr[-300:]}")
        for package in cache.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    return unpacked / "usr" / "sbin" / "sshd"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Sshd]:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh client")
    program = server_program(request.config.cache.mkdir("sshd"))
    folder = tmp_path_factory.mktemp("sshd")
    (folder / "home").mkdir()
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nPasswordAuthentication no\n"
        f'ForceCommand echo a greeting; cd {folder}/home && exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    start: list[object] = [program, "-D", "-e", "-f", folder / "config"]
    if os.getuid() == 0:
        # As root it wants a user and a folder of its own: in a mount namespace, which nobody else sees.
        (folder / "passwd").write_text(
            f"{Path('/etc/passwd').read_text()}sshd:x:999:65534::/run/sshd:/bin/false\n"
        )
        script = f"mount --bind {folder}/passwd /etc/passwd && mount -t tmpfs none /run && mkdir /run/sshd"
        start = ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh", *start]
    libraries = str(program.parents[1] / "lib" / f"{os.uname().machine}-linux-gnu")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            list(map(str, start)), stderr=log, env={**os.environ, "LD_LIBRARY_PATH": libraries}
        )
    try:
        deadline = time.monotonic() + 20
        while "Server listening" not in (said := (folder / "log").read_text()):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"sshd does not start here: {said[-300:]}")
            time.sleep(0.05)
        options = [
            f"IdentityFile={folder}/user_key",
            f"UserKnownHostsFile={folder}/known_hosts",
            "IdentitiesOnly=yes",
        ]
        yield Sshd(folder / "home", port, options)
    finally:
        server.kill()
        server.wait()


# ---- the table


class TwoLayers(nn.Module):
    """A space of four networks."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        kernels = ({f"k{k}": nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3)} for _ in range(2))
        self.stem = nn.Conv2d(in_channels, 4, 3, stride=4)
        self.layers = nn.Sequential(*(LayerChoice(ops, label=f"op{n}") for n, ops in enumerate(kernels)))
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layers(self.stem(images)).mean((2, 3)))
        return scores


def test_table_of_a_remote_device_killed_half_way_goes_on_there(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hwnas import ModelSpace
    from hwnas.cli import app
    from hwnas.latency_table import bundle_latency_table
    from lookup_tables import SessionSettings

    space, out = "tests.lookup_tables.test_remote:TwoLayers", tmp_path / "t.json"
    quick = runner_script().replace("_CHUNK = 24", "_CHUNK = 3").replace("rounds: int = 8", "rounds: int = 2")
    quick = quick.replace("_NETWORKS = 24", "_NETWORKS = 1")
    monkeypatch.setattr(bundle, "runner_script", lambda: quick)
    example = torch.zeros(1, 1, 28, 28)
    where = tmp_path / "t.json.bundle"  # what the command would write, measured in short rounds
    bundle_latency_table(ModelSpace(TwoLayers()), example, where, name=space, settings=SessionSettings())
    command = ["table", "build", "--space", space, "--out", str(out), "--remote", sshd.device().host]
    command[-1] += f":{sshd.port}"
    command += ["--remote-python", sys.executable, *(w for o in sshd.options for w in ("--ssh-option", o))]
    process = subprocess.Popen(
        [sys.executable, "-m", "hwnas", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 200
    while not ((there := sshd.results()) and there.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not out.exists()
    done = there.read_bytes()
    done = done[: done.rfind(b"\n") + 1]
    brought: list[bytes] = []
    take_in = bundle.import_bundle
    monkeypatch.setattr(
        bundle, "import_bundle", lambda f: brought.append((f / "results.jsonl").read_bytes()) or take_in(f)
    )
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "held-out error" in result.output
    assert brought[0].startswith(done)  # gone on with what was measured there
    lines = [json.loads(line) for line in brought[0].splitlines()[1:]]
    table = LookupTable.load(out)
    assert (table.device, len(table.subnets)) == (fingerprint(), 4)
    names = {(line["kind"], line["key"]) for line in lines}
    profiled = sum(line["kind"] == "profile" for line in lines)
    alone = sum(entry.method == "isolated" for entry in table.entries.values())
    assert len(names) == len(lines) == 1 + alone + 2 * 4 + profiled
    assert alone < len(table.entries)  # the others were timed inside networks
    assert sshd.results() is None
    assert not where.exists()
    before = out.read_bytes()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert out.read_bytes() == before


# ---- what may be wrong


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("no-python", "there is no 'no-python' on .*: .*not found; install Python 3.8 or newer there"),
        ("old-python", "is Python 2.7; 3.8 or newer is needed: name another one by --remote-python"),
        ("bare-python", r"lacks numpy and onnxruntime; install there: ./bare-python -m pip install numpy"),
    ],
)
def test_python_that_cannot_measure_is_named(sshd: Sshd, tmp_path: Path, python: str, says: str) -> None:
    answers = {
        "old-python": 'echo \'{"python": [2, 7], "lacks": [], "there": false}\'',
        "bare-python": f'exec "{sys.executable}" -I -S "$@"',  # -S: without what is installed
    }
    if python in answers:
        (sshd.home / python).write_text(f"#!/bin/sh\n{answers[python]}\n")
        (sshd.home / python).chmod(0o755)
    device = sshd.device(python if python == "no-python" else f"./{python}")
    with pytest.raises(ValueError, match=says):
        device.measure(bundled(tmp_path / "b"), lambda *_: None)


def test_login_that_would_ask_is_an_error_that_says_what_must_hold(sshd: Sshd, tmp_path: Path) -> None:
    stranger = replace(sshd.device(), options=("IdentityFile=none", *sshd.options[1:]))
    with pytest.raises(ValueError, match=r"Permission denied.*must log in without a question: set up a key"):
        stranger.measure(bundled(tmp_path / "b"), lambda *_: None)


def test_bundle_is_sent_once_and_its_damage_there_is_told(sshd: Sshd, tmp_path: Path) -> None:
    folder, told = bundled(tmp_path / "b"), []
    device = sshd.device()

    def interrupted(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith("measuring"):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            device.measure(folder, interrupted)
    assert (
        told.count("sending to " + device.host)
        == len(json.loads((folder / "manifest.json").read_text())["files"]) + 1
    )
    (there,) = sshd.home.glob(".cache/hwnas/*")
    next((there / "models").iterdir()).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"measuring on .* failed: error: 1 of .* files .*copy the bundle again"
    ):
        device.measure(folder, interrupted)
    device.clean_up(folder)
    assert not there.exists()


@pytest.mark.parametrize(
    ("name", "host", "port"),
    [
        ("pi", "pi", None),
        ("me@pi.local", "me@pi.local", None),
        ("me@10.0.0.7:2222", "me@10.0.0.7", 2222),
        ("me@[fe80::1]:22", "me@fe80::1", 22),
    ],
)
def test_name_of_a_device_has_user_host_and_port(name: str, host: str, port: int | None) -> None:
    device = SshDevice.named(name, ["User=x"], "~/venv/bin/python")
    assert (device.host, device.port, device.python) == (host, port, "venv/bin/python")
    command = device.command("echo", "a b")
    assert command[-3:] == ["--", host, "echo 'a b'"]
    assert command[2:4] == ["-o", "User=x"]


@pytest.mark.parametrize("name", ["", "a b", "-oProxyCommand=x", "me@", "me@pi:ssh", "me@-x", "fe80::1"])
def test_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"user@host\[:port\], such as pi@raspberrypi:22"):
        SshDevice.named(name)
