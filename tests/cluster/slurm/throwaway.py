"""A real Slurm cluster on one machine, up in seconds.

With network namespaces (needs root) every node is a machine of its own, with a name, an address, a cable that can
be cut and a power switch, on a bridge that lives in the head node's namespace: nothing shows in the host's network.
Without, all nodes share this host, one port each.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from settings import SUBNET, Layout, write

CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr")
DAEMONS = {
    "slurm-wlm": ("slurmctld", "slurmd", "srun"),
    "munge": ("munged",),
    "slurmdbd": ("slurmdbd",),
    "mariadb-server": ("mariadbd", "mariadb-install-db"),
    "iproute2": ("ip",),
}
_OUT_OF_THE_CONTROLLER = """\
#!/bin/sh
# On a node, Slurm is in reach already; from outside, step into the head node's network.
[ /etc/hosts -ef {hosts} ] && exec {real} "$@"
exec nsenter -t {head} -n -u -- {real} "$@"
"""


def missing_packages(netns: bool) -> list[str]:
    """Debian packages that this machine lacks for a cluster."""
    wanted = DAEMONS if netns else {name: DAEMONS[name] for name in ("slurm-wlm", "munge")}
    return [p for p, programs in wanted.items() if any(_where(x) is None for x in programs)]


def can_have_namespaces() -> bool:
    probe = [
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "ip",
        "link",
        "set",
        "lo",
        "up",
    ]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _where(program: str) -> str | None:
    return shutil.which(program, path=f"{os.defpath}:/usr/sbin:/sbin:/usr/local/sbin:/usr/local/bin")


class Cluster:
    """Lives in the keeper, below which all its processes are."""

    def __init__(self, folder: Path, netns: bool, nodes: int) -> None:
        self.layout = Layout(folder, netns, nodes, _free_ports(nodes + 3))
        self.processes: dict[str, subprocess.Popen] = {}

    def up(self) -> dict[str, str]:
        """Start everything; what to put into the environment of those who use it. RuntimeError if it won't."""
        write(self.layout)
        if self.layout.netns:
            self._wire()
        folder = self.layout.folder
        munge = [f"--{kind}={folder}/run/munged.{kind}" for kind in ("pid-file", "log-file", "seed-file")]
        munge += [f"--key-file={folder}/munge.key", f"--socket={self.layout.socket}"]
        self._start("munged", ["munged", "--foreground", "--force", *munge])
        self._wait("munged", self.layout.socket.exists)
        if self.layout.netns:
            self._start_accounting()
        self._start("slurmctld", ["slurmctld", "-D", "-c"], "head")
        for name in self.layout.names:
            self._start(f"slurmd-{name}", ["slurmd", "-D", "-N", name], name)
        idle = ["idle"] * self.layout.nodes
        self._wait("the nodes", lambda: self._ask("sinfo", "-hN", "-p", "main", "-o", "%T").split() == idle)
        return {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/shims:{os.environ['PATH']}"}

    def power_off(self, node: int) -> None:
        """Every process of the node dies at once."""
        self._end(f"machine-node{node}")
        self._end(f"slurmd-node{node}")

    def power_on(self, node: int) -> None:
        name = f"node{node}"
        self._new_machine(name)
        self._plug_in(node)
        self._start(f"slurmd-{name}", ["slurmd", "-D", "-N", name], name)

    def cut(self, node: int) -> None:
        """Pull the cable: no packet, and no word of it."""
        self._in_network("head", f"ip link set v{node} down")

    def heal(self, node: int) -> None:
        self._in_network("head", f"ip link set v{node} up")

    def processes_of(self, node: int) -> dict[str, str]:
        """The command lines that run on a node, by the numbers that this machine knows the processes by."""
        namespace = os.readlink(f"/proc/{self._init(f'node{node}')}/ns/pid")
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "ns/pid") == namespace:
                    found[process.name] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile
                continue
        return found

    def _wire(self) -> None:
        """The machines, the bridge between them, and the way in from outside."""
        for name in ("head", *self.layout.names):
            self._new_machine(name)
        self._in_network(
            "head",
            f"ip link add br0 type bridge forward_delay 0; ip addr add {SUBNET}.1/24 dev br0; ip link set br0 up",
        )
        for i in range(1, self.layout.nodes + 1):
            self._plug_in(i)
        for client in CLIENTS:
            shim = self.layout.folder / "shims" / client
            shim.write_text(
                _OUT_OF_THE_CONTROLLER.format(
                    real=_where(client), head=self._init("head"), hosts=self.layout.folder / "hosts"
                )
            )
            shim.chmod(0o755)

    def _new_machine(self, name: str) -> None:
        """Network, host name, mounts and processes of its own, whose first process is a shell that waits."""
        ready = self.layout.folder / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        script = (
            'set -e; hostname "$1"; mount --bind "$2/hosts" /etc/hosts; ip link set lo up; '
            ': > "$2/run/$1.ready"; while :; do sleep 3600; done'
        )
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(
            f"machine-{name}", ["unshare", *spaces, "sh", "-c", script, "sh", name, str(self.layout.folder)]
        )
        self._wait(f"the namespaces of {name}", ready.exists)

    def _plug_in(self, node: int) -> None:
        """Connect a node to the bridge."""
        inside = self._init(f"node{node}")
        self._in_network(
            "head",
            f"ip link del v{node} 2>/dev/null || true; ip link add v{node} type veth peer name eth0 netns {inside}; "
            f"ip link set v{node} master br0 up",
        )
        self._in_network(
            f"node{node}", f"ip addr add {self.layout.address(node)}/24 dev eth0; ip link set eth0 up"
        )

    def _start_accounting(self) -> None:
        folder, user = self.layout.folder, f"--user={os.environ.get('USER', 'root')}"
        data = f"--datadir={folder}/mysql"
        install = ["mariadb-install-db", "--no-defaults", data, "--auth-root-authentication-method=normal"]
        install += ["--skip-test-db", "--skip-name-resolve", user]
        with open(folder / "log" / "mariadb-install-db.out", "wb") as log:
            subprocess.run(install, check=True, stdout=log, stderr=log)
        options = [f"--socket={folder}/run/mysql.sock", f"--pid-file={folder}/run/mysql.pid", user, data]
        options += [
            "--bind-address=127.0.0.1",
            f"--port={self.layout.ports[2]}",
            f"--init-file={folder}/init.sql",
        ]
        options += ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M", "--skip-log-bin"]
        self._start("mariadbd", ["mariadbd", "--no-defaults", "--skip-name-resolve", *options], "head")
        self._wait("mariadbd", (folder / "run" / "mysql.sock").exists)
        # On a busy machine slurmdbd now and then finds no result where its new tables are to be, and ends.
        self._start("slurmdbd", ["sh", "-c", "for i in 1 2 3; do slurmdbd -D && break; done"], "head")
        self._wait("slurmdbd", lambda: "ldct" in self._ask("sacctmgr", "-i", "add", "cluster", "ldct"))

    def _start(self, name: str, command: Sequence[str], machine: str | None = None) -> None:
        if self.layout.netns and machine is not None:
            command = ["nsenter", "-t", str(self._init(machine)), "-m", "-u", "-n", "-p", "--", *command]
        else:
            command = [str(_where(command[0])), *command[1:]]
        with open(self.layout.folder / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                cwd=self.layout.folder,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        foreign = ("SLURM", "SBATCH", "SRUN", "SQUEUE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**kept, "PATH": path, "SLURM_CONF": str(self.layout.folder / "slurm.conf")}

    def _end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def _init(self, machine: str) -> int:
        """The first process of a machine's namespaces, seen from here."""
        holder = self.processes[f"machine-{machine}"].pid
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0])

    def _in_network(self, machine: str, script: str) -> None:
        command = ["nsenter", "-t", str(self._init(machine)), "-n", "sh", "-ec", script]
        subprocess.run(command, check=True, capture_output=True)

    def _ask(self, *command: str) -> str:
        """What a client of Slurm's says, errors included."""
        shim = self.layout.folder / "shims" / command[0]
        program = str(shim if shim.exists() else _where(command[0]))
        done = subprocess.run(
            [program, *command[1:]], env=self._environment(), capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def _wait(self, what: str, ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = [(self.layout.folder / "log" / f"{name}.out").read_text()[-400:] for name in dead]
                raise RuntimeError(f"no sign of {what} in {self.layout.folder}; ended: {dead} {logs}")
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    """Below the range from which the kernel serves clients."""
    for base in range(20000 + os.getpid() % 8000, 32000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(base, base + count))
    raise RuntimeError("no free ports")
