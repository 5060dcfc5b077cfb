"""Checks of the network between the ranks: which interface, open ports, and how fast."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from contextlib import ExitStack

import torch

from ldct_dist.cluster.checks import Check, Probe, Verdict

MIN_GPU_BANDWIDTH = 1e9
"""bytes a second; below it, sending the gradients of a large network takes longer than its steps"""
VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915


def look_interface(_: Probe) -> tuple[str, list[str]]:
    """(the interface towards rank 0, settings that name an interface which this node does not have)."""
    there = [name for _, name in socket.if_nameindex()]
    settings = {v: os.environ[v] for v in VARIABLES if v in os.environ}
    return interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1")), [
        f"{variable}={value}" for variable, value in settings.items() if not _names_one_of(value, there)
    ]


def judge_interface(probe: Probe, seen: list[tuple[str, list[str]]]) -> Verdict:
    wrong = {
        f"{setting} is not on {host}": None
        for host, (_, s) in zip(probe.hosts, seen, strict=True)
        for setting in s
    }
    if wrong:
        return False, f"{'; '.join(wrong)}: name one that `ip link` shows on every node"
    between = {
        name: None for host, (name, _) in zip(probe.hosts, seen, strict=True) if host != probe.hosts[0]
    }
    return True, f"{', '.join(between)} between nodes" if between else "one node"


def look_ports(probe: Probe) -> list[int]:
    """The ranks that this one cannot connect to, on ports that their kernels chose, as for gloo and NCCL."""
    with socket.create_server(("", 0), backlog=probe.world.size) as mine, ExitStack() as held:
        address = (_address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1")), mine.getsockname()[1])
        unreached = []
        for rank, peer in enumerate(probe.world.gather(address)):
            try:
                held.enter_context(socket.create_connection(peer, timeout=5))
            except OSError:
                unreached.append(rank)
        probe.world.gather(None)  # nobody closes before all have tried
        return unreached


def judge_ports(probe: Probe, seen: list[list[int]]) -> Verdict:
    closed = {
        f"{probe.hosts[rank]} does not reach {probe.where(unreached)}": None
        for rank, unreached in enumerate(seen)
        if unreached
    }
    if closed:
        return False, f"{'; '.join(closed)}: have the firewall between the nodes opened for ports above 1024"
    return True, "every rank reaches every other"


def look_all_reduce(probe: Probe) -> float:
    """Bus bandwidth of an all-reduce, bytes a second: 2 (n - 1) / n times the tensor's size over the time.

    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md#bandwidth
    """
    world = probe.world
    on_gpu = world.device.type == "cuda"
    tensor = torch.ones((64 if on_gpu else 4) * 2**20, device=world.device)
    best = float("inf")
    for _ in range(4):  # the first one connects
        world.gather(None)
        start = time.perf_counter()
        world.sum(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * (world.size - 1) / world.size * tensor.nbytes / best


def judge_all_reduce(probe: Probe, seen: list[float]) -> Verdict:
    if len(seen) == 1:
        return True, "one rank: nothing to exchange"
    rate = min(seen)
    text = f"{rate / 1e9:.2f} GB/s over {len(seen)} ranks"
    if probe.world.device.type == "cuda" and rate < MIN_GPU_BANDWIDTH:
        return False, (
            f"{text}: slow for GPUs; NCCL_DEBUG=INFO tells which network it took, NCCL_SOCKET_IFNAME and "
            "NCCL_IB_HCA choose another"
        )
    return True, text


def _names_one_of(value: str, interfaces: list[str]) -> bool:
    """Whether a value in NCCL's syntax fits an interface: a list of prefixes; after `=`, of full names; after `^`, of
    prefixes that are excluded."""
    if value.startswith("^"):
        return True
    exact, names = value.startswith("="), value.lstrip("=").split(",")
    return any(i == n if exact else i.startswith(n) for i in interfaces for n in names)


def _address_towards(host: str) -> str:
    """The address of this machine from which `host` is reached; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, 9))
        return s.getsockname()[0]


def interface_towards(host: str) -> str:
    """The network interface of this machine by which `host` is reached. Raises OSError if there is none."""
    wanted = socket.inet_aton(_address_towards(host))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(s, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an address
            if answer[20:24] == wanted:
                return name
    raise OSError(f"no interface has the address {socket.inet_ntoa(wanted)}")


CHECKS = [
    Check(look_interface, {"interface": judge_interface}),
    Check(look_ports, {"ports": judge_ports}),
    Check(look_all_reduce, {"all-reduce": judge_all_reduce}),
]
