"""Passes the environment to CMake, which builds everything, and puts the libraries into the package."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def load_env():
    """cvfast/_env.py by its path: importing the package would need the libraries that are being built."""
    spec = importlib.util.spec_from_file_location("cvfast_env", ROOT / "cvfast" / "_env.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need(program, advice):
    """The path of `program`, or an end of the build that says how to get it."""
    path = shutil.which(program)
    if path is None:
        raise SystemExit(f"cvfast: {program!r} was not found; {advice}")
    return path


class CMakeBuild(build_ext):
    """Runs CMake; the libraries land in <build_lib>/cvfast, or in the source tree for an editable install."""

    def run(self):
        options = load_env().read_build()
        cmake = need("cmake", "install it: pip install cmake ninja")
        ninja = need("ninja", "install it: pip install ninja")
        need(os.environ.get("CXX", "c++"), "install a C++20 compiler (Debian and Ubuntu: apt install g++), or set CXX")
        build = Path(self.build_temp).resolve()
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCVFAST_CUDA={options['cuda']}",
            f"-DCVFAST_CUDA_ARCHS={options['cuda_archs'] or ''}",
            f"-DCVFAST_EMULATED512={options['emulated512']}",
        ]
        jobs = str(options["max_jobs"] or os.cpu_count() or 1)
        self.forget_configuration(build)
        self.call(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *configure)
        self.call(cmake, "--build", str(build), "--parallel", jobs)
        shutil.rmtree(target / "cvfast" / "lib", ignore_errors=True)  # an earlier build's, perhaps with a CUDA part
        self.call(cmake, "--install", str(build), "--prefix", str(target))

    def forget_configuration(self, build):
        """An isolated build leaves paths of its vanished environment. Objects stay: Ninja makes anew what differs."""
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for compilers in (build / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(compilers)

    def call(self, *command):
        print("+", *command, flush=True)  # pip shows it with -v
        if subprocess.run(command).returncode:
            raise SystemExit(f"cvfast: the build failed in: {' '.join(command)}\nThe compiler's messages stand above.")


setup(ext_modules=[Extension("cvfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
