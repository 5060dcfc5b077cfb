"""slurm.conf and its companions for a throw-away cluster: as quick as Slurm goes, and nothing from /etc."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0"  # seen only inside the private namespaces
DEVICES = ("/dev/null", "/dev/zero")  # any character device passes for a GPU
CPUS = 8  # a node, whatever this machine has


@dataclass(frozen=True)
class Layout:
    """folder: holds all files. netns: each node is a machine of its own; else all share this host, by port.

    ports: for slurmctld, slurmdbd and mariadbd, then one for each node.
    """

    folder: Path
    netns: bool
    nodes: int
    ports: list[int]

    @property
    def names(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    @property
    def controller(self) -> tuple[str, str]:
        """Host name and address."""
        return ("head", f"{SUBNET}.1") if self.netns else (socket.gethostname().split(".")[0], "127.0.0.1")

    @property
    def socket(self) -> Path:
        """Where munged listens."""
        return self.folder / "run" / "munge.sock"

    def address(self, node: int) -> str:
        return f"{SUBNET}.{10 + node}"


def write(layout: Layout) -> None:
    """Write every file that the daemons read."""
    for name in ("log", "run", "state", "shims", *(f"spool/{n}" for n in layout.names)):
        (layout.folder / name).mkdir(parents=True)
    _private(layout.folder / "munge.key", os.urandom(1024))
    _private(layout.folder / "slurmdbd.conf", _slurmdbd(layout).encode())
    (layout.folder / "slurm.conf").write_text(_slurm(layout))
    (layout.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (layout.folder / "gres.conf").write_text(
        "AutoDetect=off\n"
        + "".join(f"NodeName={','.join(layout.names)} Name=gpu File={d}\n" for d in DEVICES)
    )
    hosts = [f"{layout.controller[1]} {layout.controller[0]}"]
    hosts += [f"{layout.address(i)} {name}" for i, name in enumerate(layout.names, 1)]
    (layout.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    (layout.folder / "init.sql").write_text(
        "CREATE DATABASE slurm;\nCREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
        "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
    )


def _private(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)


def _nodes(layout: Layout) -> str:
    hardware = (
        f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=8000"
    )
    lines = []
    for i, name in enumerate(layout.names, 1):
        if layout.netns:
            where = f"NodeAddr={layout.address(i)} NodeHostname={name}"
        else:
            where = f"NodeAddr=127.0.0.1 NodeHostname={layout.controller[0]} Port={layout.ports[2 + i]}"
        lines.append(f"NodeName={name} {where} {hardware} Gres=gpu:{len(DEVICES)} State=UNKNOWN")
    return "\n".join(lines)


def _slurm(layout: Layout) -> str:
    d, user, (host, address) = layout.folder, getpass.getuser(), layout.controller
    # Without namespaces there is no accounting either: sites without it exist, too.
    accounting = (
        f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost={address}\n"
        f"AccountingStoragePort={layout.ports[1]}\nAccountingStoragePass={layout.socket}"
        if layout.netns
        else "AccountingStorageType=accounting_storage/none"
    )
    return f"""\
ClusterName=ldct
SlurmctldHost={host}({address})
SlurmctldPort={layout.ports[0]}
SlurmdPort=6818
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job is held back: 120 s unless told, 5 at least
AuthInfo=socket={layout.socket},cred_expire=5
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
MinJobAge=300
BatchStartTimeout=10
UnkillableStepTimeout=20
MessageTimeout=10
TCPTimeout=2
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{_nodes(layout)}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF
"""


def _slurmdbd(layout: Layout) -> str:
    d, (host, address) = layout.folder, layout.controller
    return f"""\
AuthType=auth/munge
AuthInfo=socket={layout.socket}
DbdHost={host}
DbdAddr={address}
DbdPort={layout.ports[1]}
SlurmUser={getpass.getuser()}
LogFile={d}/log/slurmdbd.log
PidFile={d}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={layout.ports[2]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
CommitDelay=1
"""
