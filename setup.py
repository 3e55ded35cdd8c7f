"""Builds the native extension `bayesian_lora_kernels._native` from csrc/ where that is possible.

Where it is not (no PyTorch in the build environment, no compiler, a compilation that fails), the installation carries
on without it; the reason is printed, and kept in the package as `_native_build.json`, where `ops/native.py` finds it.
With BLK_BUILD_NATIVE=0 there is nothing to build, and a wheel is for every platform. Everything else about the package
is in pyproject.toml.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "bayesian_lora_kernels._native"
ARCHITECTURES = ("80", "90a", "100")  # as far as the compiler knows them; PTX of the first serves all others


def reason_not_to_build() -> str | None:
    if os.environ.get("BLK_BUILD_NATIVE", "1") == "0":
        return "switched off by BLK_BUILD_NATIVE=0"
    if importlib.util.find_spec("torch") is None:
        return "no PyTorch in the build environment (install PyTorch, then use pip install --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.name == "posix" and shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (install g++, or set CXX)"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        return f"no {header} (install Python's headers, in Debian the package python3-dev)"
    return None


def find_cuda() -> Path | None:
    """The CUDA toolkit, if this PyTorch can use one. Asks nvcc, which may be a script that lies outside the toolkit."""
    import torch

    if torch.version.cuda is None:
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(Path(home, "bin", "nvcc") if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    cuda = Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    os.environ["CUDA_HOME"] = str(cuda)  # cpp_extension reads it when it is imported, which comes after this
    return cuda


def make_extension(cuda: Path | None) -> Extension:
    sources = ["csrc/module.cpp", *sorted(glob.glob("csrc/*_cpu.cpp"))]
    headers = sorted(glob.glob("csrc/*.h"))
    if os.name == "posix":
        # -fno-*: sqrt sets no errno and traps nothing, so that loops over it are vectorised. No result changes.
        cxx = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
        if sys.platform == "linux":
            cxx.append("-fopenmp")  # at::parallel_for; PyTorch brings the library, which is therefore not linked
    else:
        cxx = ["/O2"]
    if cuda is None:
        from torch.utils.cpp_extension import CppExtension

        return CppExtension(NAME, sources, depends=headers, extra_compile_args={"cxx": cxx})

    from torch.utils.cpp_extension import CUDAExtension

    nvcc = [str(cuda / "bin" / "nvcc"), "--list-gpu-code"]
    known = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout.split()
    chosen = [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    flags += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in chosen[:1]]
    return CUDAExtension(
        NAME,
        [*sources, *sorted(glob.glob("csrc/*_cuda_op.cpp")), *sorted(glob.glob("csrc/*_cuda.cu"))],
        define_macros=[
            ("BLK_WITH_CUDA", "1"),
            ("BLK_CUDA_ARCHITECTURES", ",".join(f"sm_{name}" for name in chosen)),
        ],
        depends=headers,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", *flags]},
    )


def say(text: str) -> None:
    print(f"bayesian_lora_kernels: {text}", file=sys.stderr, flush=True)


REASON = reason_not_to_build()
CUDA: Path | None = None
if REASON is None:
    CUDA = find_cuda()
    from torch.utils.cpp_extension import BuildExtension as BaseCommand

    try:
        EXTENSION = make_extension(CUDA)
    except Exception as error:  # an incomplete CUDA toolkit; without one, an error here is ours
        if CUDA is None:
            raise
        say(f"CUDA left out: {error}")
        CUDA = None
        EXTENSION = make_extension(None)
else:
    BaseCommand = build_ext
    EXTENSION = Extension(NAME, sources=[])


class BuildNative(BaseCommand):  # type: ignore[misc]
    def run(self) -> None:
        record: dict[str, str] = {}
        inplace = self.inplace
        try:
            if REASON is not None:
                raise RuntimeError(REASON)
            super().run()
            record["torch"] = str(sys.modules["torch"].__version__)
        except Exception as error:  # whatever stops a compiler must not stop the installation
            record["reason"] = " ".join(str(error).split())
            say(f"native extension left out: {record['reason']}")
            self.inplace = inplace  # setuptools does not restore it after an error
            # what an earlier build left there may be for another PyTorch
            Path(self.get_ext_fullpath(NAME)).unlink(missing_ok=True)
            self.extensions = []
        note = Path(self.get_ext_fullpath(NAME)).with_name("_native_build.json")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(record) + "\n")

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
            say(f"native extension built, {'without' if CUDA is None else 'with'} CUDA")
        except Exception as error:
            if CUDA is None:
                raise RuntimeError(f"compilation failed ({error}); see the output of pip install -v") from error
            say(f"the CUDA part does not build ({error}); building the host part alone")
            vars(self.extensions[0]).update(vars(make_extension(None)))
            super().build_extensions()
            say("native extension built, without CUDA")


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """False makes a pure wheel; editable installations always run BuildNative, which removes an old build."""
        return os.environ.get("BLK_BUILD_NATIVE") != "0" or "editable_wheel" in self.commands


setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildNative}, distclass=Package)
