"""Posteriors on disk: the disk is full, memory is short, others write too, files claim what they do not hold."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, mlp
from safetensors.torch import load_file
from saves import race

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import exact
from bayesian_lora_kernels.posterior import storage, tensor_file
from bayesian_lora_kernels.posterior.tensor_file import Columns, TensorFile, write_tensors


def fitted(precision: float = 1.0, **settings: Any) -> blk.LaplaceLoRA:
    case = mlp()
    laplace = blk.LaplaceLoRA(case.model, prior_precision=precision, **settings)
    return laplace.fit(case.loader(2), progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the format ------------------------------------------------------------------------------------------------------


def test_safetensors_reads_what_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 7 * 4 * 3)  # three columns at a time
    wide = torch.randn(7, 10)
    tensors = {
        "zero": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "narrow": torch.randn(5, 3).bfloat16(),
        "halves": torch.randn(3).half(),
        "transposed": torch.randn(4, 3, dtype=torch.float64).T,
        "grad": torch.randn(2, requires_grad=True),
        "é\n": torch.randn(2),
    }
    asked = []

    def read(columns: slice) -> torch.Tensor:
        asked.append(columns.stop - columns.start)
        return wide[:, columns]

    path = tmp_path / "x.safetensors"
    write_tensors(path, {**tensors, "wide": Columns(10, read)})
    found = load_file(path)
    assert max(asked) == 3
    assert found.keys() == {*tensors, "wide"}
    for name, tensor in {**tensors, "wide": wide}.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(TensorFile(path).read(name), tensor)
    assert torch.equal(TensorFile(path).read("wide", rows=slice(2, 5)), wide[2:5])
    with pytest.raises(TypeError, match=r"y: expected a tensor of .*, got torch.int64"):
        write_tensors(path, {"y": torch.arange(3)})


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_rows_that_memory_does_not_hold_are_saved_and_read(tmp_path: Path) -> None:
    """100 MB of rows in files, of which saving and loading hold no more than pieces: 40 MB are allowed."""
    script = """
import resource, sys, torch
from pathlib import Path
from bayesian_lora_kernels.curvature import exact
from bayesian_lora_kernels.curvature.rows import RowStore
from bayesian_lora_kernels.posterior import storage, tensor_file
from bayesian_lora_kernels.posterior.stored import Stored

tensor_file.PIECE_BYTES = exact.SLICE_BYTES = 4 * 2**20
exact.default_budget = lambda device: 2**20
torch.set_num_threads(1)
torch.ones(300, 300) @ torch.ones(300, 300)  # what a library allocates once
store = RowStore({"one": 200_000, "two": 50_000}, 2**20)
for step in range(25):
    store.append({"one": torch.full((4, 200_000), float(step)), "two": torch.full((4, 50_000), -float(step))})
shapes = {"one": (200, 1000), "two": (50, 1000)}
numbers = torch.arange(25, dtype=torch.float64).repeat_interleave(4)
gram = 250_000 * torch.outer(numbers, numbers)
device = torch.device("cpu")
curvature = exact.FunctionSpaceCurvature(store, shapes, device, gram)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + 40 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
storage.check_description = lambda *_: None
storage.save(sys.argv[1], curvature.pack()[0], {})
limit += next(Path(sys.argv[1]).glob("*.safetensors")).stat().st_size  # the library maps the file, which counts
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
tensors, _ = storage.load(sys.argv[1])
layers = {name: {"shape": shape} for name, shape in shapes.items()}
stored = Stored(tensors, layers, {name: name for name in shapes}, dict.fromkeys(shapes, device))
again = exact.FunctionSpaceCurvature.unpack(stored)
assert again.store.n_rows == 100
for columns in (slice(0, 3), slice(49_000, 50_000)):
    for name in shapes:
        assert torch.equal(again.store.rows(name, columns), store.rows(name, columns))
try:
    torch.empty(100 * 2**20, dtype=torch.uint8)
except RuntimeError:
    print("the limit holds")
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "the limit holds"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) >= 100 * 10**6


# ---- a disk that is full, or not to be written -----------------------------------------------------------------------


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file becomes longer than this, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_what_was_there(before: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    other = fitted(5.0, fisher="empirical")
    other.save_pretrained(tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    if before:
        fitted().save_pretrained(folder)
    there = contents(folder)
    for size in (0, 1, 8, 100, 1000, largest // 2, largest - 1):
        with room_for(size), pytest.raises(OSError, match=f"File too large: '{folder}'"):
            other.save_pretrained(folder)
        assert contents(folder) == there
    with room_for(largest):
        other.save_pretrained(folder)
    assert contents(folder) == contents(tmp_path / "whole")


def raised(function: Callable[[], object]) -> OSError | None:
    try:
        function()
    except OSError as error:
        return error
    return None


CALLS: dict[str, tuple[Any, str]] = {
    "mkdir": (Path, "mkdir"),
    "open": (builtins, "open"),
    "mkstemp": (storage.tempfile, "mkstemp"),
    "fsync": (os, "fsync"),
    "chmod": (os, "chmod"),
    "replace": (os, "replace"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_whatever_fails_leaves_what_was_there(name: str, code: int, tmp_path: Path) -> None:
    """Each call of the system in turn."""
    fitted().save_pretrained(tmp_path)
    there, other = contents(tmp_path), fitted(5.0, fisher="empirical")
    place, attribute = CALLS[name]
    true = getattr(place, attribute)
    for step in range(1, 20):
        calls = 0

        def fail(*arguments: Any, true: Callable[..., Any] = true, step: int = step, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise OSError(code, os.strerror(code))
            return true(*arguments, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, attribute, fail)
            error = raised(lambda: other.save_pretrained(tmp_path))
        if error is None:
            assert step > 1
            break
        assert error.errno == code
        assert str(tmp_path) in str(error)
        if contents(tmp_path) != there:
            assert step > 2  # what fails after the new posterior is in place leaves that one
            blk.LaplaceLoRA.from_pretrained(mlp().model, tmp_path)
            assert len(contents(tmp_path)) <= 3
    else:
        pytest.fail("it never came to an end")
    assert contents(tmp_path) != there
    assert len(contents(tmp_path)) == 2


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        fitted().save_pretrained(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file"):
        fitted().save_pretrained(tmp_path / "file" / "below")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    there = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match=str(tmp_path)):
            fitted(5.0).save_pretrained(tmp_path)
        assert contents(tmp_path) == there
    finally:
        tmp_path.chmod(0o755)


# ---- others write, too -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(storage.fcntl is None, reason="no fork here")
@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_save_at_once(locks: bool, tmp_path: Path) -> None:
    assert race(tmp_path, 8, locks) == []


def test_without_locks_tensors_of_others_stay_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may be about to name them."""
    monkeypatch.setattr(storage, "fcntl", None)
    others = [tmp_path / f"laplace-{digit * 16}.safetensors" for digit in "01"]
    for path in others:
        path.write_text("")
    os.utime(others[1], (0, 0))
    fitted().save_pretrained(tmp_path)
    assert [path.exists() for path in others] == [True, False]


# ---- files that claim what they do not hold --------------------------------------------------------------------------


def sealed(folder: Path, change: Callable[[dict[str, Any]], Any], tensors: bytes | None = None) -> None:
    """The JSON file changed, with checksums that are right again."""
    path = folder / "laplace.json"
    content = json.loads(path.read_text())
    if tensors is not None:
        (folder / content["tensors"]["file"]).write_bytes(tensors)
        content["tensors"]["sha256"] = hashlib.sha256(tensors).hexdigest()
    change(content)
    content["sha256"] = storage.content_digest(content)
    path.write_text(json.dumps(content))


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def larger(entries: dict[str, Any]) -> None:
    entries["first.basis_s"]["shape"] = [6, 10**12]
    entries["first.basis_s"]["data_offsets"][1] += 8 * 6 * 10**12


HEADERS = {
    "larger than the file": larger,
    "overlapping": lambda e: e["first.s"].update(data_offsets=e["first.a"]["data_offsets"]),
    "of another size": lambda e: e["first.s"].update(shape=[5, 6]),
    "of an unknown kind": lambda e: e["first.s"].update(dtype="F65"),
    "without one": lambda e: e.pop("first.s"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fitted().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_checked_against_the_file(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(saved.glob("*.safetensors")).read_bytes()
    sealed(saved, lambda content: None, with_header(data, HEADERS[name]))
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read before it was checked"))
    with pytest.raises(ValueError, match=rf"{saved}.*damaged: "):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


@pytest.mark.parametrize("start", [2**63, 2**40, 10**8, 0])
def test_a_header_of_any_length(start: int, saved: Path) -> None:
    data = next(saved.glob("*.safetensors")).read_bytes()
    sealed(saved, lambda content: None, start.to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=r"safetensors: damaged: "):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


def changed(data: bytes, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    from safetensors.torch import load, save

    tensors = load(data)
    tensors[name] = change(tensors[name]).contiguous()
    return save(tensors)


VALUES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "not finite": ("first.s", lambda t: t * torch.nan, "first.s: expected finite numbers"),
    "whole numbers": ("first.s", lambda t: t.long(), r"expected a tensor first.s of shape \[6, k\], got I64"),
    "of another shape": ("first.s", lambda t: t[:5], r"expected a tensor first.s of shape \[6, k\], got F64 of"),
}


@pytest.mark.parametrize("name", VALUES)
def test_tensors_are_checked_as_they_are_read(name: str, saved: Path) -> None:
    tensor, change, message = VALUES[name]
    data = next(saved.glob("*.safetensors")).read_bytes()
    sealed(saved, lambda content: None, changed(data, tensor, change))
    with pytest.raises(ValueError, match=message):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


def test_eigenvalues_are_not_negative(saved: Path) -> None:
    data = next(saved.glob("*.safetensors")).read_bytes()
    block = next(name for name in load_file(next(saved.glob("*.safetensors"))) if name.startswith("first.") and (
        name.rpartition(".")[2] not in ("a", "s", "basis_a", "basis_s", "tail_a", "tail_s")))  # fmt: skip
    sealed(saved, lambda content: None, changed(data, block, lambda t: t - 1e6))
    with pytest.raises(ValueError, match=rf"{block}: expected eigenvalues of a curvature"):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


def test_tensors_are_read_when_they_are_asked_for(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before a layer of the wrong shape was found, and then one at a time."""
    read, names = TensorFile.read, []

    def noted(self: TensorFile, name: str, *more: Any) -> torch.Tensor:
        names.append(name)
        return read(self, name, *more)

    monkeypatch.setattr(TensorFile, "read", noted)
    with pytest.raises(ValueError, match="expected first of shape"):
        blk.LaplaceLoRA.from_pretrained(mlp(width=7).model, saved)
    with pytest.raises(ValueError, match="lacks"):
        blk.LaplaceLoRA.from_pretrained(llama().model, saved)
    assert not names
    blk.LaplaceLoRA.from_pretrained(mlp().model, saved)
    assert sorted(names) == sorted(load_file(next(saved.glob("*.safetensors"))))


def test_what_happens_to_the_file_later_changes_nothing(saved: Path) -> None:
    case = mlp()
    laplace = blk.LaplaceLoRA.from_pretrained(case.model, saved)
    before = laplace.predict(case.batch()).covariance
    path = next(saved.glob("*.safetensors"))
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
        file.truncate(10)
    laplace.prior_precision = 2.0
    laplace.prior_precision = 1.0
    assert torch.equal(laplace.predict(case.batch()).covariance, before)


TEXTS = {
    "nested": (b"[" * 100_000, "damaged, not JSON"),
    "nested, and closed": (b"[" * 20_000 + b"]" * 20_000, "damaged, not JSON"),
    "a number of many digits": (b'{"n": ' + b"9" * 10_000 + b"}", "damaged, not JSON"),
    "long": (b" " * 2_000_000, "expected at most 1,000,000 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_is_none(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "JSON_BYTES", 10**6)
    text, message = TEXTS[name]
    (saved / "laplace.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"laplace.json: {message}"):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "precision": (lambda c: c["prior_precision"].update(first=10**400), "prior_precision.first: expected a finite"),
    "examples": (lambda c: c.update(n_examples=10**30), "n_examples: expected a number"),
    "shape": (lambda c: c["layers"]["first"].update(shape=[10**30, 5]), r"layers.first.shape: expected \[d_out, d_in"),
    "values": (
        lambda c: next(iter(c["base_model"]["tensors"].values())).update(values=2**62) if c["base_model"]["tensors"]
        else c["base_model"]["tensors"].update(x={"shape": [], "dtype": "x", "values": 2**62}),
        "expected a tensor base_model of shape",
    ),
    "norm": (lambda c: c["layers"]["last"].update(square_norm=-1.0), "layers.last.square_norm: expected a finite"),
    "a file elsewhere": (lambda c: c["tensors"].update(file="../x.safetensors"), "tensors.file: expected the name"),
    "a file of no name": (lambda c: c["tensors"].update(file="\0.safetensors"), "tensors.file: expected the name"),
    "classes": (lambda c: c.update(class_token_ids=[2**64]), "class_token_ids: expected null or a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_a_description_is_checked(name: str, saved: Path) -> None:
    change, message = CLAIMS[name]
    sealed(saved, change)
    with pytest.raises(ValueError, match=message):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["laplace.json", "tensors"])
def test_a_pipe_is_not_waited_for(name: str, saved: Path) -> None:
    path = saved / name if name == "laplace.json" else next(saved.glob("*.safetensors"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((ValueError, FileNotFoundError), match="expected a f"):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


def test_rows_come_back_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, laplace = mlp(), fitted(curvature="exact")
    laplace.save_pretrained(tmp_path)
    monkeypatch.setattr(exact, "SLICE_BYTES", 2000)
    monkeypatch.setattr(exact, "default_budget", lambda device: 3000)
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    assert again.posterior.curvature.store.place == "file"  # type: ignore[attr-defined]
    found, truth = again.predict(case.batch()).covariance, laplace.predict(case.batch()).covariance
    assert torch.allclose(found, truth, rtol=1e-12)


@pytest.mark.parametrize("tensor", ["gram", "last.rows"])
@pytest.mark.parametrize("number", [5.0, -1e230])
def test_rows_are_those_of_their_gram_matrix(tensor: str, number: float, tmp_path: Path) -> None:
    fitted(curvature="exact").save_pretrained(tmp_path)
    data = next(tmp_path.glob("*.safetensors")).read_bytes()

    def change(t: torch.Tensor) -> torch.Tensor:
        t[1, 0] = number
        return t

    sealed(tmp_path, lambda content: None, changed(data, tensor, change))
    with pytest.raises(ValueError, match="gram: expected the inner products of the rows"):
        blk.LaplaceLoRA.from_pretrained(mlp().model, tmp_path)


@pytest.mark.parametrize("scale", [2.0, 1e308])
def test_bases_are_orthonormal(scale: float, saved: Path) -> None:
    data = next(saved.glob("*.safetensors")).read_bytes()
    sealed(saved, lambda content: None, changed(data, "first.basis_a", lambda t: t * scale))
    with pytest.raises(ValueError, match=r"first.basis_a: expected (orthonormal columns|finite numbers)"):
        blk.LaplaceLoRA.from_pretrained(mlp().model, saved)


def test_a_reader_between_two_posteriors_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that JSON names are gone, then another posterior is there, then the first one again; three times."""
    one, other = fitted(2.0), fitted(7.0, fisher="empirical")
    one.save_pretrained(tmp_path)
    opened, calls = tensor_file.safe_open, []

    def overtaken(path: Path, framework: str) -> Any:
        calls.append(path)
        if len(calls) > 3:
            return opened(path, framework)
        other.save_pretrained(tmp_path)
        try:
            torch.UntypedStorage.from_file(str(path), False, 8)  # as safetensors does it
        finally:
            one.save_pretrained(tmp_path)

    monkeypatch.setattr(tensor_file, "safe_open", overtaken)
    assert float(blk.LaplaceLoRA.from_pretrained(mlp().model, tmp_path).prior_precision) == 2.0
    assert len(calls) == 4
