"""The cffi builder of `trio_uring._native`: declarations from cdef.h, code from the .c files. setup.py runs it."""

import os
import sysconfig
from pathlib import Path

from cffi import FFI

flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
link_flags = []
if os.environ.get("TRIO_URING_SANITIZE") == "address":
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [*sanitizers, "-g", "-fno-omit-frame-pointer"]
    link_flags += sanitizers

# The stable ABI of the oldest Python. A debug build and one without the GIL have none.
stable = not sysconfig.get_config_var("Py_DEBUG") and not sysconfig.get_config_var("Py_GIL_DISABLED")

ffibuilder = FFI()
ffibuilder.cdef(Path(__file__).with_name("cdef.h").read_text())
ffibuilder.set_source(
    "trio_uring._native",
    '#include "ring.c"\n#include "fill.c"\n#include "slot.c"',
    include_dirs=["native"],
    depends=["native/cdef.h", "native/ring.c", "native/fill.c", "native/slot.c"],
    define_macros=[("Py_LIMITED_API", "0x030a0000")] if stable else [],
    libraries=["uring"],
    extra_compile_args=flags,
    extra_link_args=link_flags,
    py_limited_api=True,
)
