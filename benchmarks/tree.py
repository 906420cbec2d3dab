"""CPU and memory of a process and of all that it started, from /proc: on Linux only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def children() -> set[int]:
    """The processes that this one has started and that have not ended."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def family(roots: Iterable[int]) -> dict[int, list[str]]:
    """Processes and all their descendants: what /proc/<pid>/stat says after the name, from the state on."""
    fields: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields[int(path.parent.name)] = path.read_text(errors="replace").rpartition(")")[2].split()
    tree, size = set(roots), 0
    while size != len(tree):
        size = len(tree)
        tree |= {pid for pid, values in fields.items() if int(values[1]) in tree}
    return {pid: fields[pid] for pid in tree & fields.keys()}


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time that processes and all their descendants have used, those that have ended included."""
    return sum(int(value) for values in family(roots).values() for value in values[11:15]) / os.sysconf("SC_CLK_TCK")


def memory_mb(roots: Iterable[int]) -> float:
    """What processes and all their descendants hold: all of their own memory, and the largest mapping of files.

    Processes of one server map the same libraries, which the machine holds once.
    """
    held: dict[str, list[int]] = {"RssAnon": [0], "RssFile": [0], "RssShmem": [0]}  # in KiB
    for pid in family(roots):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name in held:
                    held[name].append(int(value.split()[0]))
    return (sum(held["RssAnon"]) + max(held["RssFile"]) + max(held["RssShmem"])) * 1024 / 1e6
