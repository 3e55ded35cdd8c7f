"""Builds sdist and wheels, installs and tries each, and looks at what is in them: `make release-check`.

Prints a line for each check; the exit code is 1 if one failed. The environments are empty but for a path to where this
Python finds PyTorch, transformers and so on; the package itself they have from the built files alone. The manylinux
wheel is what pip makes of the sdist where there is a compiler. In each environment the quick start runs with a compiler
and without, with Triton and without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wheels import build, run, variables

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("release-check: needs PyTorch and the package's other requirements; run make release-check")
BASE = Path(spec.origin).parents[1]
PACKAGE = "bayesian_lora_kernels"
failed: list[str] = []


def check(what: str, found: object, detail: object = "") -> None:
    print(f"{'ok    ' if found else 'FAILED'}  {what}{f': {detail}' if detail != '' else ''}", flush=True)
    if not found:
        failed.append(what)


def last_line(log: str) -> str:
    return next((line for line in reversed(log.splitlines()) if line.strip()), "")


def environment(compiler: bool) -> dict[str, str]:
    """The variables of a user with, or without, a C++ compiler."""
    env = {**variables(), "OMP_NUM_THREADS": "1"}
    if not compiler:
        env["PATH"] = os.path.dirname(sys.executable)
        assert shutil.which("c++", path=env["PATH"]) is None
    return env


def find(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else None


def look_inside_sdist(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    wanted = {x for x in files if x.startswith((f"{PACKAGE}/", "csrc/", "tests/", "examples/"))} | {
        "LICENSE",
        "setup.py",
    }
    missing = sorted(wanted - there)
    check("sdist has package, csrc, tests and examples", not missing, ", ".join(missing) or f"{len(wanted)} files")
    version = find(r'^__version__ = "(.+)"', (source / PACKAGE / "__init__.py").read_text())
    versions = {
        "__version__": version,
        "sdist": find(rf"^{PACKAGE}-(.+)\.tar\.gz$", sdist.name),
        "CITATION.cff": find(r"^version: (.+)$", (source / "CITATION.cff").read_text()),
        "CHANGELOG.md": find(r"^## \[(\d.*?)\]", (source / "CHANGELOG.md").read_text()),
    }
    check("one version everywhere", len(set(versions.values())) == 1, versions)


def look_inside_wheel(name: str, wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if not name.endswith("/")}
    modules = {str(path.relative_to(source)) for path in (source / PACKAGE).rglob("*") if path.is_file()}
    missing = sorted(modules - there)
    check(f"{name} has the whole package, with py.typed", not missing, ", ".join(missing) or f"{len(modules)} files")
    compiled = {x for x in there if x.startswith(f"{PACKAGE}/_native")}
    expected = 0 if name == "pure wheel" else 2  # the library, and the note of what it is for
    check(f"{name} has {'the' if expected else 'no'} native extension", len(compiled) == expected, sorted(compiled))
    foreign = sorted(x for x in there - modules - compiled if not re.match(rf"{PACKAGE}-[\d.]+\.dist-info/", x))
    check(f"{name} has nothing else", not foreign, ", ".join(foreign))
    check(f"{name} has the licence", any(x.endswith("licenses/LICENSE") for x in there))


def install_and_try(name: str, file: Path, work: Path, triton: str | None, native: str) -> Path:
    """In an empty environment, outside the source tree, which is returned; the sdist without a compiler."""
    place = work / re.sub(r"\W+", "-", name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=work)[1].strip()
    Path(site, "base.pth").write_text(f"{BASE}\n")
    options = ["--no-deps", "--ignore-installed", "--no-build-isolation"]
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *options, file]
    good, log = run(*command, cwd=work, env=environment(compiler=False))
    check(f"{name}: installs", good, "" if good else last_line(log))
    if not good:
        return Path(site)
    complaints = [line for line in run(python, "-m", "pip", "check", cwd=work)[1].splitlines() if PACKAGE in line]
    check(f"{name}: its requirements are met", not complaints, "; ".join(complaints))
    check_native(name, python, native)

    def quick_start(case: tuple[bool, str | None]) -> None:
        compiler, there = case
        env = {**environment(compiler), **({"PYTHONPATH": there} if there else {})}
        what = f"{name}, {'with' if compiler else 'without'} a compiler, {'with' if there else 'without'} Triton"
        so = f"assert bool(importlib.util.find_spec('triton')) is {bool(there)}"
        script = str(work / "unpacked" / "examples" / "quickstart.py")
        code = f"import importlib.util, runpy; {so}; runpy.run_path({script!r}, run_name='__main__')"
        good, log = run(python, "-c", code, cwd=place, env=env)
        check(f"{what}: examples/quickstart.py runs", good, "" if good else last_line(log))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(quick_start, [(False, None), (True, triton)]))
    good, log = run(place / "bin" / "blk", "doctor", cwd=place, env=environment(compiler=False))
    check(f"{name}: blk doctor passes", good, "" if good else last_line(log))
    return Path(site)


def check_native(name: str, python: Path, expected: str) -> None:
    """The package is the installed one, and what it says of the native extension has `expected` in it."""
    code = (
        f"import {PACKAGE}.ops.native as n; print(n.__file__); print(n.why_unavailable() or 'native extension ready')"
    )
    where, state = run(python, "-c", code, cwd=python.parent, env=environment(compiler=False))[1].splitlines()[-2:]
    good = Path(where).is_relative_to(python.parents[1]) and expected in state
    check(f"{name}: is the installed one, with the native extension or the reason why not", good, state)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triton", metavar="FOLDER", help="that Triton is installed in")
    triton = parser.parse_args().triton
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, pure, manylinux = files = build(work, work / "dist")
        for file in files:
            check("built", True, f"{file.name}, {file.stat().st_size / 1e6:.1f} MB")
        check("the pure wheel is for every platform", pure.name.endswith("-py3-none-any.whl"))
        check("the other one says which glibc it needs", re.search(r"-manylinux_\d+_\d+_\w+\.whl$", manylinux.name))
        look_inside_sdist(sdist, work / "source")
        look_inside_wheel("pure wheel", pure, work / "source")
        look_inside_wheel("manylinux wheel", manylinux, work / "source")
        good, log = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=work)
        check("README renders (twine check)", good, "" if good else log)
        install_and_try("sdist", sdist, work, triton, "no C++ compiler")
        install_and_try("pure wheel", pure, work, triton, "was not built")
        site = install_and_try("manylinux wheel", manylinux, work, triton, "native extension ready")
        # under another PyTorch
        (site / PACKAGE / "_native_build.json").write_text(json.dumps({"torch": "1.0.0"}))
        check_native("manylinux wheel", work / "manylinux-wheel" / "bin" / "python", "was built for PyTorch 1.0.0")
    print(f"release-check: {'passed' if not failed else f'{len(failed)} failed'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
