"""The orchestrator's command line, without figures, as a process for which permissions hold even if it is root's."""

from __future__ import annotations

import ctypes
import os
import sys

import program_without_figures

DAC_OVERRIDE, CAPABILITY_VERSION, DROP_FROM_BOUNDING_SET = 1, 0x20080522, 24  # linux/capability.h, linux/prctl.h


def give_up_override() -> None:
    """As `setpriv --inh-caps=-dac_override --bounding-set=-dac_override` does, without starting a program anew."""
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # the lower words of the effective, the permitted and the inheritable set come first
    failed = system.capget(header, sets) or system.prctl(DROP_FROM_BOUNDING_SET, DAC_OVERRIDE, 0, 0, 0)
    for number in range(3):
        sets[number] &= ~(1 << DAC_OVERRIDE)
    if failed or system.capset(header, sets):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    if os.geteuid() == 0:
        give_up_override()
    sys.exit(program_without_figures.main())
