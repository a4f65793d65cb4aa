"""What building `trio_uring._native` needs and pip cannot bring. As a script it prints what is missing."""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile

# What; a program that builds only where it is there; what to link with; the packages for apt, dnf, apk and pacman.
# io_uring_register_sync_cancel came with liburing 2.3.
NEEDS = [
    ("a C compiler", "#include <stdio.h>", [], ["gcc libc6-dev", "gcc", "gcc musl-dev", "gcc"]),
    ("Python.h", "#include <Python.h>", [], ["python3-dev", "python3-devel", "python3-dev", "python"]),
    (
        "liburing 2.3 or newer with its headers",
        "#include <liburing.h>\nint f(struct io_uring *ring) { return io_uring_register_sync_cancel(ring, 0); }",
        ["-luring", "-Wl,--no-undefined"],
        ["liburing-dev", "liburing-devel", "liburing-dev", "liburing"],
    ),
]


def missing() -> list[tuple[str, list[str]]]:
    found = []
    for what, program, link, packages in NEEDS:
        if not builds(program, link):
            found.append((what, packages))
            if what == "a C compiler":
                break  # nothing else can be known
    return found


def builds(program: str, link: list[str]) -> bool:
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc"
    flags = " ".join(os.environ.get(name, "") for name in ("CPPFLAGS", "CFLAGS", "LDFLAGS"))
    command = [*shlex.split(compiler), *shlex.split(flags), "-shared", "-fPIC", "-Werror=implicit-function-declaration"]
    command += [f"-I{sysconfig.get_path('include')}", "-x", "c", "-", *link]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            command += ["-o", f"{scratch}/probe.so"]
            subprocess.run(command, check=True, input=program + "\n", text=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


def check() -> None:
    """Ends the build with one sentence if it cannot succeed."""
    if sys.platform != "linux":
        sys.exit(f"trio-uring needs Linux: io_uring belongs to its kernel, and this is {sys.platform}.")
    for what, (apt, dnf, apk, pacman) in missing():
        sys.exit(
            f"trio-uring cannot be built because {what} is missing: install it with `apt install {apt}`, "
            f"`dnf install {dnf}`, `apk add {apk}` or `pacman -S {pacman}`."
        )


if __name__ == "__main__":
    for what, _ in missing():
        print(what)
