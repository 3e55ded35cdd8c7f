"""Builds what is released: the sdist, a pure wheel, and a manylinux wheel with the native extension: `make wheels`.

All come from the files that git knows, the wheels by way of the sdist. The pure wheel is for every platform. The other
is for one version of Python and one build of PyTorch, those of this environment: PyTorch promises no binary interface,
and under another one the package says so and goes on without the extension (`ops/native.py`). PyTorch's own libraries
stay outside. The tag names the glibc that the compiled code needs: older where it is built with an older one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from shutil import copy

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# What PyTorch and its CUDA packages have loaded by the time that the extension is.
OF_PYTORCH = ("libtorch*.so", "libc10*.so", "libcudart.so.*")


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> tuple[bool, str]:
    """Whether a command ended well, and all that it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode == 0, done.stdout


def variables() -> dict[str, str]:
    """The environment variables of a user who has set none of ours; programs of this environment come first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BLK_", "PYTHON", "CC", "CXX", "MAKE"))}
    return {**kept, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{kept['PATH']}"}


def must(what: str, *command: object, cwd: Path, env: dict[str, str]) -> None:
    good, log = run(*command, cwd=cwd, env=env)
    if not good:
        print(log)
        sys.exit(f"wheels: no {what}")


def build(work: Path, dist: Path) -> tuple[Path, Path, Path]:
    """The sdist, the pure and the manylinux wheel, in `dist`; sources are left in `work/source` and `work/unpacked`."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        sys.exit("wheels: this is no git checkout, so what belongs to the release is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (work / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, work / "source" / name)

    env = variables()
    build_sdist = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", work / "sdist"]
    must("sdist", *build_sdist, cwd=work / "source", env=env)
    sdist = next((work / "sdist").iterdir())
    with tarfile.open(sdist) as archive:
        archive.extractall(work)
    (work / sdist.name.removesuffix(".tar.gz")).rename(work / "unpacked")

    wheel = [*PIP, "wheel", "--no-deps", "--no-build-isolation", sdist, "--wheel-dir"]
    must("pure wheel", *wheel, work / "pure", cwd=work, env={**env, "BLK_BUILD_NATIVE": "0"})
    must("native wheel", *wheel, work / "linux", cwd=work, env=env)
    pure, linux = (next((work / name).iterdir()) for name in ("pure", "linux"))
    outside = [option for library in OF_PYTORCH for option in ("--exclude", library)]
    repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", *outside, "--wheel-dir", work / "manylinux"]
    must("manylinux wheel", *repair, linux, cwd=work, env=env)

    dist.mkdir(parents=True, exist_ok=True)
    manylinux = next((work / "manylinux").iterdir())
    return dist / copy(sdist, dist), dist / copy(pure, dist), dist / copy(manylinux, dist)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for file in build(Path(folder), ROOT / "dist"):
            print(f"dist/{file.name}, {file.stat().st_size / 1e6:.1f} MB")
