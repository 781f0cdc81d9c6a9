"""Run a program with the restrictions that a unit file names, as far as they need no manager.

``python unit_sandbox.py UNIT PROGRAM …`` applies NoNewPrivileges, MemoryDenyWriteExecute,
RestrictAddressFamilies and SystemCallFilter of UNIT to itself, the way systemd.exec(5) words them,
and then executes PROGRAM, which inherits all of them.  The filter is made with libseccomp, which is
there wherever systemd is.  Not installed as a service, the daemon meets its sandbox all the same.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import socket
import subprocess
import sys
from typing import Final

PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_MDWE: Final = 65
PR_MDWE_REFUSE_EXEC_GAIN: Final = 1
SCMP_ACT_ALLOW: Final = 0x7FFF_0000
SCMP_ACT_ERRNO: Final = 0x0005_0000
SCMP_CMP_EQ: Final = 4
FAMILIES: Final = {
    "AF_UNIX": socket.AF_UNIX,
    "AF_INET": socket.AF_INET,
    "AF_INET6": socket.AF_INET6,
}


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def directives(unit: str) -> list[tuple[str, str]]:
    """The lines of [Service], in their order; a name may come more than once."""
    with open(unit, encoding="utf-8") as file:
        section, found = "", []
        for line in map(str.strip, file):
            if line.startswith("["):
                section = line
            elif section == "[Service]" and "=" in line and not line.startswith("#"):
                name, _, value = line.partition("=")
                found.append((name, value))
    return found


def expanded(groups: str) -> set[str]:
    """The system calls in a list of names and @groups, as systemd-analyze(1) knows them."""
    calls: set[str] = set()
    for name in groups.split():
        if not name.startswith("@"):
            calls.add(name)
            continue
        listing = subprocess.run(
            ["systemd-analyze", "syscall-filter", "--no-pager", name],
            capture_output=True,
            text=True,
            check=True,
        )
        members = [line.strip() for line in listing.stdout.splitlines() if line.startswith(" ")]
        calls |= expanded(" ".join(member for member in members if not member.startswith("#")))
    return calls


def allowed_calls(unit: list[tuple[str, str]]) -> set[str]:
    calls = expanded("@default")
    for name, value in unit:
        if name == "SystemCallFilter":
            calls = calls - expanded(value[1:]) if value[0] == "~" else calls | expanded(value)
    return calls


def restrict(unit: list[tuple[str, str]]) -> None:
    """Apply the directives to this process, for good."""
    values = dict(unit)
    libc = ctypes.CDLL(None, use_errno=True)
    families = [FAMILIES[name] for name in values["RestrictAddressFamilies"].split()]
    calls = sorted(allowed_calls(unit))
    assert values["NoNewPrivileges"] == "yes"
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert values["SystemCallErrorNumber"] == "EPERM"
    seccomp = ctypes.CDLL(ctypes.util.find_library("seccomp") or "libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_ERRNO | errno.EPERM))
    for name in calls:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # of another architecture
        if name == "socket":
            for family in families:
                only = _Comparison(0, SCMP_CMP_EQ, family, 0)
                assert seccomp.seccomp_rule_add(context, SCMP_ACT_ALLOW, number, 1, only) == 0
        else:
            assert seccomp.seccomp_rule_add(context, SCMP_ACT_ALLOW, number, 0) == 0
    assert seccomp.seccomp_load(context) == 0
    assert values["MemoryDenyWriteExecute"] == "yes"
    assert libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0


if __name__ == "__main__":
    restrict(directives(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
