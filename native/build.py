"""The cffi builder of `trio_uring._native`: declarations from cdef.h, code from ring.c and fill.c. setup.py runs it."""

import os
from pathlib import Path

from cffi import FFI

flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
link_flags = []
if os.environ.get("TRIO_URING_SANITIZE") == "address":
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [*sanitizers, "-g", "-fno-omit-frame-pointer"]
    link_flags += sanitizers

ffibuilder = FFI()
ffibuilder.cdef(Path(__file__).with_name("cdef.h").read_text())
ffibuilder.set_source(
    "trio_uring._native",
    '#include "ring.c"\n#include "fill.c"',
    include_dirs=["native"],
    depends=["native/cdef.h", "native/ring.c", "native/fill.c"],
    libraries=["uring"],
    extra_compile_args=flags,
    extra_link_args=link_flags,
    py_limited_api=True,
)
