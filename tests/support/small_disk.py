"""The orchestrator's command line with a disk of two pages in the place of a folder, in a mount namespace of its own.

A program of its own, so that it starts where torch is imported already.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PROGRAM = str(Path(__file__).resolve())
NOT_MOUNTED = 99
NEW_NAMESPACES, PRIVATE = 0x10000000 | 0x20000, 0x4000 | 0x40000  # linux/sched.h (user, mounts), linux/mount.h


def mount(place: str) -> None:
    """As `unshare --map-root-user --mount` and `mount -t tmpfs` do, without starting a program anew."""
    system = ctypes.CDLL(None, use_errno=True)
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    if system.unshare(NEW_NAMESPACES):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, value in maps.items():
        Path("/proc/self", name).write_text(value)
    for source, target, kind, flags, options in (
        (b"none", b"/", None, PRIVATE, None),
        (b"none", os.fsencode(place), b"tmpfs", 0, b"size=8k"),
    ):
        if system.mount(source, target, kind, ctypes.c_ulong(flags), options):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), place)


def main() -> int:
    """The exit code of the command line, or `NOT_MOUNTED`; prints what is left on the disk."""
    place = sys.argv.pop(1)
    try:
        mount(place)
    except (OSError, AttributeError) as error:
        print(error, file=sys.stderr)
        return NOT_MOUNTED
    import ensemble_orchestrator

    code = ensemble_orchestrator.main(sys.argv[1:])
    for path in Path(place).rglob("*"):
        if path.is_file():
            print(path)
    return code


if __name__ == "__main__":
    sys.exit(main())
