"""Starts tritonserver so that no other user of the machine can read its shared memory.

Triton's Python backend passes prompts and pictures through files in /dev/shm. Boost, which creates those files, sets
their mode to 0644 by `fchmod`, whatever the umask is. This file is a program that the supervisor runs in front of the
server:

- It sets the umask to 077, so that a file is private from the moment it is created.
- It installs a seccomp filter that refuses `fchmod(…, 0644)`, so that the file stays private. Boost goes on regardless.
- It executes the server in its own place. The process id stays the same, and all processes of the server inherit both.

No privilege is needed. The price is `no_new_privs`: set-user-id programs gain nothing when the server runs them.

Only the standard library is imported: this runs before each start, without site-packages.
"""

import ctypes
import errno
import os
import platform
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

UMASK = 0o077
BOOST_MODE = 0o644
"""Default mode of shared memory in Boost.Interprocess."""

_NOT_FOUND = 127
"""Exit status for a program that can't be executed, as shells have it."""

_SYSCALLS = {"x86_64": (0xC000003E, 91, 317), "aarch64": (0xC00000B7, 52, 277)}
"""By machine: its AUDIT_ARCH, and the numbers of fchmod and seccomp (linux/audit.h, asm/unistd.h)."""

# linux/filter.h and linux/seccomp.h
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCH, _SECOND_ARGUMENT = 0, 4, 24
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _SPEC_ALLOW = 1, 4


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def command(program: Sequence[str]) -> list[str]:
    """Return the command line that starts `program` with private shared memory."""
    return [sys.executable, "-I", "-S", __file__, *program]


def exposed(folder: Path, prefix: str) -> list[Path]:
    """Return the files in `folder` that begin with `prefix` and that other users may open."""
    files = []
    for file in sorted(folder.glob(f"{prefix}*")):
        try:
            mode = file.lstat().st_mode
        except FileNotFoundError:  # removed meanwhile
            continue
        if stat.S_IMODE(mode) & UMASK:
            files.append(file)
    return files


def _filter(arch: int, fchmod: int) -> bytes:
    """Assemble the filter: `fchmod(…, 0644)` fails with EPERM, every other system call is allowed."""
    program = (
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_IF_EQUAL, 0, 5, arch),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 3, fchmod),
        (_LOAD, 0, 0, _SECOND_ARGUMENT),
        (_JUMP_IF_EQUAL, 0, 1, BOOST_MODE),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _refuse_open_modes() -> None:
    """Install the filter in this process, for good. Raises OSError."""
    machine = platform.machine()
    if machine not in _SYSCALLS:
        raise OSError(errno.ENOSYS, f"unknown machine {machine}")
    arch, fchmod, seccomp = _SYSCALLS[machine]
    code = _filter(arch, fchmod)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code) // 8, code)
    # SPEC_ALLOW: kernels before 5.16 slow a filtered process down against speculation otherwise.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        ctypes.c_long(seccomp), ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(_SPEC_ALLOW), ctypes.byref(program)
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(program: list[str]) -> int:
    """Execute `program`, which replaces this process; return only if that fails.

    A kernel that refuses the filter is no reason not to serve: the supervisor looks at the modes and warns.
    """
    os.umask(UMASK)
    try:
        _refuse_open_modes()
    except OSError as error:
        sys.stderr.write(f"fluxserve: no private shared memory: seccomp: {error.strerror}\n")
    try:
        os.execv(program[0], program)  # noqa: S606 (no shell is wanted)
    except OSError as error:
        sys.stderr.write(f"fluxserve: {program[0]}: {error.strerror}\n")
        return _NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
