"""Adds the C extension to what pyproject.toml says."""

import runpy
import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext

if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
    runpy.run_path("native/needs.py")["check"]()


class BuildExt(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # an up-to-date file may have been built with other flags


setup(
    cffi_modules=["native/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
