"""The process that a throw-away cluster lives under: when its standard input ends, all below it is killed.

So nothing is left behind, however the tests end: the pipe closes with the process that held it.

    keeper.py FOLDER netns|ports NODES      then a line of JSON an order: ["power_off", 2]
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = [int(word) for word in (task / "children").read_text().split()]
        except FileNotFoundError:  # ended meanwhile
            continue
        for child in children:
            found += [child, *_safely(child)]
    return found


def _safely(pid: int) -> list[int]:
    try:
        return descendants(pid)
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill_all_below() -> None:
    """Orphans, such as Slurm's step daemons, have become this process's own children: none escapes."""
    while below := descendants(os.getpid()):
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _bury()
        time.sleep(0.02)


def _bury() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> None:
    from throwaway import Cluster

    folder, mode, nodes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        cluster = Cluster(folder, netns=mode == "netns", nodes=nodes)
        answer: object = cluster.up()
        print(json.dumps(answer), flush=True)
        for line in sys.stdin:
            order, *arguments = json.loads(line)
            try:
                answer = getattr(cluster, order)(*arguments)
            except (OSError, RuntimeError, subprocess.SubprocessError) as e:
                answer = {"error": f"{order}: {e}"}
            print(json.dumps(answer), flush=True)
    finally:
        kill_all_below()


if __name__ == "__main__":
    main()
