"""Several hosts on one machine: network namespaces, each with its own address, loopback, home and model cache.

Nodes of `ray.cluster_utils.Cluster` share 127.0.0.1, `~/.cache` and `/tmp`, so what works only because of that passes
there and fails on a cluster. Here it fails as well.

    with hosts(2) as cluster:
        cluster.start_ray(num_cpus=(0, 2))                 # host 0 is the head, without CPUs
        cluster.run(0, ["ray", "status"])                  # a finished process, or AssertionError with its output
        job = cluster.start(1, ["sleep", "60"])            # a process that goes on
        cluster.cut(1); cluster.heal(1); cluster.kill(1)   # off the network, back, and dead
    cluster.start_node(1, num_cpus=2)                  # a new node in its place

Only the hosts see each other; files are shared, as on a cluster with shared storage, but for `HOME`, `TMPDIR` and the
caches. Hosts need root and iproute2: mark a test with `@needs_hosts`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
PORT = 6379
"""Of the head's control service."""
PREFIX = "aft-"
QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "6",
}
"""With these a lost node is noticed in 6 to 18 seconds instead of 60, and one that is slow on a busy machine stays."""
OURS = ("HF_", "RAY_", "AFT_RAY_", "XDG_", "TRANSFORMERS_", "VLLM_CACHE")
"""Beginnings of the variables that no host inherits: they point into this machine's home and cluster."""

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)
_numbers = itertools.count()


class Hosts:
    """A number of hosts that see each other and nothing else."""

    def __init__(self, num_hosts: int) -> None:
        self.name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self.num_hosts = num_hosts
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))  # short: Ray's sockets have 107 characters
        subnet = os.getpid() % 16384
        self.subnet = f"10.{64 + subnet // 256}.{subnet % 256}"
        self.ray_address: str | None = None
        """Of the cluster that `start_ray` has started. Processes on the hosts find it in `RAY_ADDRESS`."""
        self._started: list[tuple[int, subprocess.Popen[str]]] = []

    def address(self, host: int) -> str:
        """Return the address at which the other hosts reach this one."""
        return f"{self.subnet}.{host + 1}"

    def home(self, host: int) -> Path:
        return self.folder / str(host) / "home"

    def start(
        self, host: int, command: Sequence[str], *, log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a process on a host, in the repository's root. What it says goes to `log`, else to pipes."""
        output = log.open("a") if log else subprocess.PIPE
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace(host), *command],
            env={**self._environment(host), **(env or {})},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if log:
            output.close()  # type: ignore[union-attr]
        self._started.append((host, process))
        return process

    def run(
        self,
        host: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end. With `check`, it must end with 0."""
        process = self.start(host, command, env=env)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(
                f"host {host}: {command} took over {timeout_s} s:\n{out[-3000:]}{err[-6000:]}"
            ) from None
        done = subprocess.CompletedProcess(list(command), process.returncode, out, err)
        assert not check or done.returncode == 0, f"host {host}: {command}:\n{out[-3000:]}{err[-6000:]}"
        return done

    def start_ray(
        self,
        num_cpus: Sequence[float],
        *,
        num_gpus: Sequence[float] = (),
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> None:
        """Start a Ray cluster with a node on each host that `num_cpus` has a number for; host 0 is the head."""
        for host, cpus in enumerate(num_cpus):
            self.start_node(host, cpus, num_gpus[host] if num_gpus else None, env=env)
            self.wait_for_nodes(host + 1, timeout_s)

    def start_node(
        self, host: int, num_cpus: float, num_gpus: float | None = None, *, env: Mapping[str, str] | None = None
    ) -> None:
        """Start a node of the cluster on a host, also again after `kill`. Host 0 is the head."""
        where = (
            ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"]
            if host == 0
            else [f"--address={self.address(0)}:{PORT}"]
        )
        gpus = [] if num_gpus is None else [f"--num-gpus={num_gpus:g}"]
        command = ["ray", "start", *where, "--block", f"--node-ip-address={self.address(host)}", *gpus]
        command += [f"--num-cpus={num_cpus:g}", "--object-store-memory=100000000", "--disable-usage-stats"]
        # Else every node takes the head's, and what one node's agent removes another one still works in.
        command.append(f"--temp-dir={self.folder / str(host) / 'ray'}")
        self.start(host, command, log=self.folder / f"ray-{host}.log", env=env)
        self.ray_address = f"{self.address(0)}:{PORT}"

    def wait_for_nodes(self, num_nodes: int, timeout_s: float = 120) -> None:
        """Wait until so many nodes of the cluster are alive."""
        count = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); "
        count += "print('ALIVE', sum(node['Alive'] for node in ray.nodes()))"
        end = time.monotonic() + timeout_s
        while True:
            done = self.run(0, [sys.executable, "-c", count], check=False, timeout_s=timeout_s)
            if f"ALIVE {num_nodes}\n" in done.stdout:
                return
            logs = "".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("ray-*.log")))
            assert time.monotonic() < end, f"not {num_nodes} nodes: {done.stdout}{done.stderr[-2000:]}\n{logs}"
            time.sleep(0.5)

    def cut(self, host: int) -> None:
        """Take a host off the network: its processes go on, and nobody sees them."""
        _ip("-n", self._net, "link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        _ip("-n", self._net, "link", "set", f"port{host}", "up")

    def kill(self, host: int) -> None:
        """Kill every process on a host at once, as when the machine is lost."""
        for started_on, process in self._started:
            if started_on == host and process.poll() is None:  # it may be on its way into the namespace
                process.kill()
        _kill_all(self._namespace(host))

    @property
    def _net(self) -> str:
        return f"{self.name}-net"

    def _namespace(self, host: int) -> str:
        return f"{self.name}-host{host}"

    def _environment(self, host: int) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
        temporary = str(self.folder / str(host))
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.home(host)),
            "TMPDIR": temporary,
            "RAY_TMPDIR": temporary,
            "AFT_RAY_CACHE": str(self.home(host) / ".cache" / "aft_ray"),
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
            "RAY_worker_niceness": "0",
            **({"RAY_ADDRESS": self.ray_address} if self.ray_address else {}),
        }

    def _up(self) -> None:
        _ip("netns", "add", self._net)
        _ip("-n", self._net, "link", "set", "lo", "up")
        _ip("-n", self._net, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._net, "link", "set", "bridge", "up")
        for host in range(self.num_hosts):
            name = self._namespace(host)
            _ip("netns", "add", name)
            peer = ("peer", "name", f"port{host}", "netns", self._net)
            _ip("link", "add", "name", "eth0", "netns", name, "type", "veth", *peer)
            _ip("-n", self._net, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            (self.home(host) / ".cache").mkdir(parents=True)

    def _down(self) -> None:
        for host in range(self.num_hosts):
            if self._namespace(host) in _namespaces():
                self.kill(host)
        _remove(self.name)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def hosts(num_hosts: int) -> Iterator[Hosts]:
    """Yield `num_hosts` hosts, numbered from 0. They and all their processes are gone when the block ends."""
    _remove_what_the_dead_left()
    made = Hosts(num_hosts)
    try:
        made._up()
        yield made
    finally:
        made._down()


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(PREFIX)]


def _kill_all(namespace: str) -> None:
    """Kill the processes of a namespace, and wait until none is left."""
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _remove(name: str) -> None:
    """Remove the hosts of one name and their network."""
    for namespace in _namespaces():
        if namespace.startswith(f"{name}-"):
            _kill_all(namespace)
            _ip("netns", "del", namespace)


def _remove_what_the_dead_left() -> None:
    """Remove hosts whose test was killed: their names begin with the id of a process that is gone."""
    for name in {"-".join(namespace.split("-")[:3]) for namespace in _namespaces()}:
        pid = name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(name)
