"""Builds sdist and wheel, installs and tries each, and looks at what is in them: `make release-check`.

Prints a line for each check; the exit code is 1 if one failed. The environments are empty but for a path to where this
Python finds PyTorch, transformers and so on; the package itself they have from the built files alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("release-check: needs PyTorch and the package's other requirements; run make release-check")
BASE = Path(spec.origin).parents[1]
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bayesian_lora_kernels"
BUILD = [sys.executable, "-m", "build", "--no-isolation"]
failed: list[str] = []


def check(what: str, found: object, detail: object = "") -> None:
    print(f"{'ok    ' if found else 'FAILED'}  {what}{f': {detail}' if detail != '' else ''}", flush=True)
    if not found:
        failed.append(what)


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> tuple[bool, str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode == 0, done.stdout


def last_line(log: str) -> str:
    return next((line for line in reversed(log.splitlines()) if line.strip()), "")


def environment(compiler: bool) -> dict[str, str]:
    """The variables of a user with, or without, a C++ compiler, who has set none of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BLK_", "PYTHON", "CC", "CXX", "MAKE"))}
    if not compiler:
        kept["PATH"] = os.path.dirname(sys.executable)
        assert shutil.which("c++", path=kept["PATH"]) is None
    return kept


def build(work: Path) -> tuple[Path, Path]:
    """The sdist, of a clean copy of the sources, and a wheel built from it with a compiler."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        sys.exit("release-check: this is no git checkout, so what belongs to the release is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (work / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / "source" / name)
    dist = work / "dist"
    for kind, where in ("sdist", work / "source"), ("wheel", work / "unpacked"):
        good, log = run(*BUILD, f"--{kind}", "--outdir", dist, ".", cwd=where, env=environment(compiler=True))
        if not good:
            print(log)
            sys.exit(f"release-check: no {kind}")
        if kind == "sdist":
            sdist = next(dist.glob("*.tar.gz"))
            with tarfile.open(sdist) as archive:
                archive.extractall(work)
            (work / sdist.name.removesuffix(".tar.gz")).rename(work / "unpacked")
    return sdist, next(dist.glob("*.whl"))


def look_inside(sdist: Path, wheel: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in in_wheel if name.endswith(".dist-info/METADATA"))
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    modules = {name for name in files if name.startswith(f"{PACKAGE}/")}
    for where, there in ("sdist", in_sdist), ("wheel", in_wheel):
        missing = sorted(modules - there)
        check(
            f"{where} has the whole package, with py.typed", not missing, ", ".join(missing) or f"{len(modules)} files"
        )
    wanted = {name for name in files if name.startswith(("csrc/", "tests/", "examples/"))} | {"LICENSE", "setup.py"}
    missing = sorted(wanted - in_sdist)
    check("sdist has csrc, tests and examples", not missing, ", ".join(missing))
    foreign = sorted(name for name in in_wheel if not name.startswith((f"{PACKAGE}/", f"{PACKAGE}-")))
    check("wheel has no tests, and nothing beside the package", not foreign, ", ".join(foreign))
    compiled = [name for name in in_wheel if name.startswith(f"{PACKAGE}/_native.") and name.endswith((".so", ".pyd"))]
    check("wheel has the native extension", compiled, ", ".join(compiled))
    check("wheel has the licence", any(name.endswith("licenses/LICENSE") for name in in_wheel))

    def find(pattern: str, text: str) -> str | None:
        match = re.search(pattern, text, re.MULTILINE)
        return match[1] if match else None

    versions = {
        "pyproject.toml": find(r'^version = "(.+)"', (source / "pyproject.toml").read_text()),
        "__version__": find(r'^__version__ = "(.+)"', (source / PACKAGE / "__init__.py").read_text()),
        "sdist": find(rf"^{PACKAGE}-(.+)\.tar\.gz$", sdist.name),
        "wheel": find(r"^Version: (.+)$", metadata),
    }
    check("one version everywhere", len(set(versions.values())) == 1, versions["wheel"] or versions)
    headings = find(
        rf"^## \[({re.escape(versions['pyproject.toml'] or '')}|Unreleased)\]", (source / "CHANGELOG.md").read_text()
    )
    check("CHANGELOG.md has a section for it", headings, headings)


def install_and_try(name: str, file: Path, work: Path, compiler: bool) -> None:
    """In an empty environment, outside the source tree."""
    what = f"{name}, {'with' if compiler else 'without'} a compiler"
    env, place = environment(compiler), work / re.sub(r"\W+", "-", what)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=work)[1].strip()
    Path(site, "base.pth").write_text(f"{BASE}\n")
    options = ["--no-deps", "--ignore-installed", "--no-build-isolation", "-v"]
    good, log = run(python, "-m", "pip", "--disable-pip-version-check", "install", *options, file, cwd=work, env=env)
    said = re.search(r"bayesian_lora_kernels: (native extension .*)", log)
    check(f"{what}: installs", good, said[1] if said else "" if good else last_line(log))
    if not good:
        return
    expected = "native extension" if file.suffix == ".whl" or compiler else "left out"
    state = run(
        python,
        "-c",
        f"import {PACKAGE}.ops.native as n; print(n.__file__); print(n.why_unavailable() or 'native extension ready')",
        cwd=work,
        env=env,
    )[1].splitlines()
    check(f"{what}: is the installed one", str(place) in state[0], "" if str(place) in state[0] else state[0])
    if expected == "left out":
        check(f"{what}: says why the native extension is left out", said and "no C++ compiler" in state[-1], state[-1])
    else:
        check(f"{what}: has the native extension", state[-1] == "native extension ready", state[-1])
    complaints = [line for line in run(python, "-m", "pip", "check", cwd=work)[1].splitlines() if PACKAGE in line]
    check(f"{what}: its requirements are met", not complaints, "; ".join(complaints))
    good, log = run(python, work / "unpacked" / "examples" / "quickstart.py", cwd=place, env=env)
    check(f"{what}: examples/quickstart.py runs", good, "" if good else last_line(log))
    good, log = run(place / "bin" / "blk", "doctor", cwd=place, env=env)
    check(f"{what}: blk doctor passes", good, "" if good else last_line(log))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build(work)
        for file in sdist, wheel:
            check("built", True, f"{file.name}, {file.stat().st_size / 1e6:.1f} MB")
        look_inside(sdist, wheel, work / "source")
        good, log = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=work)
        check("README renders (twine check)", good, "" if good else log)
        install_and_try("sdist", sdist, work, compiler=False)
        install_and_try("sdist", sdist, work, compiler=True)
        install_and_try("wheel", wheel, work, compiler=False)
    print(f"release-check: {'passed' if not failed else f'{len(failed)} failed'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
