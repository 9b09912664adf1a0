"""Runs one program that nobody has read, in a process that can do nothing but compute. Executed as a script.

Standard input: a JSON object with `program`, `seconds`, `memory` (bytes) and `token`. The token is written to standard
output if, and only if, the program ran to its end without an exception. Linux on x86-64 or arm64; exit code 3: the
program cannot be contained here, and was not run. Only the standard library: the process starts in milliseconds.

What contains it, each sufficient for its part: resource limits (processor time, memory, open files, no file contents)
and a seccomp filter that lets through the system calls of an interpreter that computes and reads files. Everything
else fails with "not permitted": sockets, new processes and threads, opening files for writing, changing, renaming or
deleting them, signals to other processes, new programs. The filter cannot be taken off.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

CANNOT_CONTAIN = 3

# seccomp(2), linux/filter.h, linux/audit.h
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refuse: errno 1, "operation not permitted"
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

COMPUTING = {
    "x86_64": "0 1 3-15 17 19-21 23-25 28 32 33 35 39 60 63 79 89 96-99 102 104 107 108 110 131 186 201 202 204 217 "
    "228-231 262 267 269 318 332 334",
    "aarch64": "17 23 48 57 61-67 72 73 78-80 93 94 96 98 99 101 113-115 123 124 132 134 135 139 153 160 163 165 "
    "169 172-179 214-216 222 226 233 278 291 293",
}
"""What an interpreter needs once it runs, and no more: numbers of system calls in the kernel's tables.

Without ioctl: some of its requests change a file (its attributes, for one) that is only open for reading."""
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OPENAT = {"x86_64": 257, "aarch64": 56}
OPEN = {"x86_64": 2}


def filter_program(machine: str) -> bytes:
    """The filter, as instructions (code, jump if true, jump if false, constant) of the kernel's packet filter."""
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for span in COMPUTING[machine].split():
        first, _, last = span.partition("-")
        for number in range(int(first), int(last or first) + 1):
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    # Files may be opened for reading. The flags are the second argument of open, the third of openat.
    for opening, offset in ((OPENAT[machine], 32), (OPEN.get(machine), 24)):
        if opening is not None:
            program += [(EQUAL, 0, 4, opening), (LOAD, 0, 0, offset), (ANY_BIT, 0, 1, WRITING)]
            program += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def contain(seconds: int, memory: int) -> bool:
    """Take from this process, for good, whatever a program needs only to do harm; False where that is impossible."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in COMPUTING:
        return False
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    code = filter_program(machine)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    number = ctypes.c_ulong
    if libc.prctl(PR_SET_NO_NEW_PRIVS, number(1), number(0), number(0), number(0)) != 0:
        return False
    mode = number(SECCOMP_MODE_FILTER)
    return bool(libc.prctl(PR_SET_SECCOMP, mode, ctypes.byref(program), number(0), number(0)) == 0)


def main() -> None:
    task = json.load(sys.stdin)
    answer = os.dup(1)  # where the token goes; what the program prints goes nowhere
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if not contain(task["seconds"], task["memory"]):
        os._exit(CANNOT_CONTAIN)
    try:
        exec(compile(task["program"], "<generated>", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit too: a program that leaves early has not passed
        os._exit(1)
    os.write(answer, task["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
