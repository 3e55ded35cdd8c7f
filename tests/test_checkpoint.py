"""A fit that ended before its time goes on from its checkpoint to the same result, bit for bit, or says why not."""

from __future__ import annotations

import errno
import json
import os
import random
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import PASSES, SETTINGS, Batches, Stop, case, differences, laplace, tensors
from models import mlp
from snapshot import untouched
from torch.utils.data import DataLoader

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import checkpoint, checkpoint_folder
from bayesian_lora_kernels.curvature.identity import identity
from bayesian_lora_kernels.model import deferred
from bayesian_lora_kernels.model.deferred import Deferred

RANK = "0/rank-0-of-1"


def stopped(setting: str, folder: Path, after: int, one: Any = None, **settings: Any) -> None:
    one = one or case()
    with pytest.raises(Stop):
        laplace(one, setting, **settings).fit(Batches(one.loader(2), after), progress=False, checkpoint=folder, every=1)


@contextmanager
def counted(model: Any) -> Any:
    """The forward passes of a model."""
    ran: list[int] = []
    hook = model.register_forward_hook(lambda *_: ran.append(1))
    yield ran
    hook.remove()


# ---- it goes on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_goes_on_to_the_same_result(setting, tmp_path):
    """Stopped before any batch; what was counted is read again, and not run."""
    one = case()
    loader = one.loader(2)
    expected = tensors(laplace(one, setting).fit(loader, progress=False))
    for after in range(0, PASSES[setting] * len(loader), PASSES[setting]):
        folder = tmp_path / str(after)
        stopped(setting, folder, after, one)
        with counted(one.model) as ran:
            again = laplace(one, setting).fit(Batches(loader), progress=False, checkpoint=folder, every=1)
        assert differences(tensors(again), expected) == []
        assert len(ran) == PASSES[setting] * len(loader) - after
        assert not (folder / RANK).exists()


def test_it_is_stopped_again_and_again(tmp_path):
    one = case()
    checked = {"check": "first"}
    expected = tensors(laplace(one, "ekfac", **checked).fit(one.loader(2), progress=False))
    for after in range(1, 8):  # what was counted is read again: one batch more each time
        stopped("ekfac", tmp_path, after, one, **checked)
    found = laplace(one, "ekfac", **checked).fit(one.loader(2), progress=False, checkpoint=tmp_path)
    assert differences(tensors(found), expected) == []


def test_ctrl_c_leaves_a_checkpoint_and_a_clean_model(tmp_path):
    one = case()
    expected = tensors(laplace(one, "exact").fit(one.loader(2), progress=False))
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    interrupted = laplace(one, "exact", check="always")
    hook = one.model.get_base_model().lm_head.register_forward_hook(interrupt)
    with untouched(one.model), pytest.raises(KeyboardInterrupt):
        interrupted.fit(one.loader(2), progress=False, checkpoint=tmp_path, every=1)
    hook.remove()
    kept = json.loads((tmp_path / RANK / "checkpoint.json").read_text())
    assert "pass 0" in kept["parts"]
    interrupted.fit(one.loader(2), progress=False, checkpoint=tmp_path)
    assert differences(tensors(interrupted), expected) == []


class Dataset(torch.utils.data.Dataset):
    """Examples with noise from a generator that everybody shares."""

    def __init__(self, one: Any, draws: str):
        self.one, self.draws = one, draws

    def __len__(self) -> int:
        return len(self.one.examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}
        return self.one.examples[index] + noise.get(self.draws, lambda: 0)(), self.one.labels[index]


@pytest.mark.parametrize("draws", ["torch", "numpy", "python", "own generator", "unseeded generator"])
def test_a_shuffled_loader_gives_the_same_order_again(draws, tmp_path):
    """Whatever has been drawn since: also of the second pass, whose order is another."""
    one = mlp(n=12)

    def loader() -> Any:
        generator = torch.Generator().manual_seed(5) if draws == "own generator" else None
        if draws == "unseeded generator":
            generator = torch.Generator()
            generator.seed()
        return DataLoader(Dataset(one, draws), batch_size=3, shuffle=True, generator=generator)

    def ekfac() -> blk.LaplaceLoRA:
        return blk.LaplaceLoRA(one.model, curvature="ekfac", fisher="mc", rank=None)

    class Stopping:
        def __init__(self, of: Any, after: int):
            self.of, self.after, self.batches = of, after, []

        def __iter__(self) -> Any:
            for batch in self.of:
                if len(self.batches) == self.after:
                    raise Stop
                self.batches.append(batch[0])
                yield batch

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

    def seed(number: int) -> None:
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)

    for after in (2, 6):
        seed(0)
        first = loader()
        begun = [one.get_state() for one in [first.generator] if one is not None]
        whole = Stopping(first, 99)
        expected = tensors(ekfac().fit(whole, progress=False))
        drawn = torch.rand(3)
        assert not torch.equal(torch.cat(whole.batches[:4]), torch.cat(whole.batches[4:]))
        seed(0)
        for state in begun:
            first.generator.set_state(state)
        with pytest.raises(Stop):
            ekfac().fit(Stopping(first, after), progress=False, checkpoint=tmp_path, every=1)
        seed(1)
        again = Stopping(loader(), 99)
        found = ekfac().fit(again, progress=False, checkpoint=tmp_path)
        assert differences(tensors(found), expected) == []
        assert torch.equal(torch.cat(again.batches), torch.cat(whole.batches))
        assert torch.equal(torch.rand(3), drawn), "what is drawn afterwards"


def test_a_forward_that_draws_goes_on_with_its_numbers(tmp_path):
    one = mlp(n=8)

    def noisy() -> blk.LaplaceLoRA:
        def forward(model: Any, batch: Any) -> torch.Tensor:
            return model(batch[0] + torch.randn(batch[0].shape, dtype=torch.float64))

        return blk.LaplaceLoRA(one.model, forward=forward, curvature="ekfac", check="off")

    for after in (0, 2, 4, 5):
        torch.manual_seed(0)
        expected = tensors(noisy().fit(one.loader(2), progress=False))
        torch.manual_seed(0)
        with pytest.raises(Stop):
            noisy().fit(Batches(one.loader(2), after), progress=False, checkpoint=tmp_path, every=1)
        torch.manual_seed(0 if after == 0 else 1)
        found = noisy().fit(one.loader(2), progress=False, checkpoint=tmp_path)
        assert differences(tensors(found), expected) == []


class Stateful(Batches):
    """A loader that says where it was, as torchdata's StatefulDataLoader does."""

    position, passes = 0, 0

    def __iter__(self) -> Any:
        while self.position < len(self.batches):
            if self.given == self.stop:
                raise Stop
            self.given += 1
            self.position += 1
            yield self.batches[self.position - 1]
        self.position, self.passes = 0, self.passes + 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "passes": self.passes, 7: (torch.tensor([self.position]), [None, 0.5])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert int(state[7][0]) == state["position"]
        assert state[7][1] == [None, 0.5]
        self.position, self.passes = state["position"], state["passes"]


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_a_loader_that_says_where_it_was_is_asked(after, tmp_path):
    one = case()
    expected = tensors(laplace(one, "ekfac").fit(one.loader(2), progress=False))
    with pytest.raises(Stop):
        laplace(one, "ekfac").fit(Stateful(one.loader(2), after), progress=False, checkpoint=tmp_path, every=1)
    loader = Stateful(one.loader(2))
    found = laplace(one, "ekfac").fit(loader, progress=False, checkpoint=tmp_path)
    assert differences(tensors(found), expected) == []
    assert loader.given == 8 - after, "nothing is read twice"
    assert loader.passes == 2


def test_a_state_that_no_file_can_hold_is_not_needed(tmp_path):
    class Odd(Stateful):
        def state_dict(self) -> Any:
            return {"position": object()}

    one = case()
    expected = tensors(laplace(one, "exact").fit(one.loader(2), progress=False))
    with pytest.raises(Stop):
        laplace(one, "exact").fit(Odd(one.loader(2), 2), progress=False, checkpoint=tmp_path, every=1)
    loader = Odd(one.loader(2))
    found = laplace(one, "exact").fit(loader, progress=False, checkpoint=tmp_path)
    assert differences(tensors(found), expected) == []
    assert loader.given == 4


def test_rows_in_files_and_rows_that_are_written_once(tmp_path):
    """Rows beyond the budget lie in files of the fit; the checkpoint's blocks are written once each."""
    one = case()
    loader, budget = one.loader(2), {"memory_budget": 10000}
    expected = tensors(laplace(one, "exact", **budget).fit(loader, progress=False))
    stopped("exact", tmp_path, 2, one, **budget)
    blocks = sorted((tmp_path / RANK).glob("*-rows-*"))
    assert len(blocks) == 2
    before = {path: path.stat().st_mtime_ns for path in blocks}
    stopped("exact", tmp_path, 3, one, **budget)
    assert len(list((tmp_path / RANK).glob("*-rows-*"))) == 3
    assert {path: path.stat().st_mtime_ns for path in blocks} == before
    found = laplace(one, "exact", **budget).fit(loader, progress=False, checkpoint=tmp_path)
    assert found.posterior.curvature.store.place == "file"
    assert differences(tensors(found), expected) == []


def test_fewer_examples_at_a_time_stay_fewer(tmp_path):
    from test_out_of_memory import MESSAGES, short

    one = mlp(n=16)
    with pytest.MonkeyPatch.context() as patch:
        with short(patch, "run", 0, MESSAGES["gpu"], most=3), pytest.raises(Stop):
            blk.LaplaceLoRA(one.model).fit(Batches(one.loader(8), 1), progress=False, checkpoint=tmp_path, every=1)
        with short(patch, "run", 0, MESSAGES["gpu"], most=3) as failed:
            blk.LaplaceLoRA(one.model).fit(one.loader(8), progress=False, checkpoint=tmp_path)
    assert failed == []


# ---- when it is written ----------------------------------------------------------------------------------------------


def test_how_often(tmp_path, monkeypatch):
    one = mlp(n=14)
    clock, written = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    write = checkpoint_folder.CheckpointFolder.write

    def noted(self: Any, identity: Any, parts: Any) -> None:
        write(self, identity, parts)
        clock[0] += 10.0
        if parts["fit"]["passes"]:
            written.append(parts["fit"]["passes"][-1]["batches"])

    monkeypatch.setattr(checkpoint_folder.CheckpointFolder, "write", noted)

    class Slow(Batches):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch
                clock[0] += 50.0

    blk.LaplaceLoRA(one.model).fit(Slow(one.loader(2)), progress=False, checkpoint=tmp_path, every=3)
    assert written == [3, 6, 7]
    written.clear()
    blk.LaplaceLoRA(one.model).fit(Slow(one.loader(2)), progress=False, checkpoint=tmp_path)
    assert written == [2, 6, 7]  # a minute; then 20 times the 10 s that it took; and what is finished


def test_nothing_is_written_that_has_not_been_looked_at(tmp_path, monkeypatch):
    """Flags of a GPU are looked at a batch later; not where that would be after a checkpoint."""

    def later(self: Deferred, bad: torch.Tensor, error: Any) -> None:
        self._new.append((bad, error))

    monkeypatch.setattr(Deferred, "add", later)
    monkeypatch.setattr(deferred, "_to_host", lambda flags: (flags, None))
    one = mlp(n=8)
    loader = one.loader(2)
    loader[1][0][0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        blk.LaplaceLoRA(one.model, check="off").fit(loader, progress=False, checkpoint=tmp_path, every=1)
    loader[1][0][0] = 0.0
    expected = tensors(blk.LaplaceLoRA(one.model).fit(loader, progress=False))
    with counted(one.model) as ran:
        found = blk.LaplaceLoRA(one.model, check="off").fit(loader, progress=False, checkpoint=tmp_path)
    assert differences(tensors(found), expected) == []
    assert len(ran) == 3


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "1"])
def test_bad_intervals(every, tmp_path):
    with pytest.raises((ValueError, TypeError), match="every: expected"):
        blk.LaplaceLoRA(mlp().model).fit([], progress=False, checkpoint=tmp_path, every=every)
    with pytest.raises(ValueError, match="every: expected checkpoint=folder"):
        blk.LaplaceLoRA(mlp().model).fit([], progress=False, every=2)


def test_a_weight_is_no_bias():
    """Of one input and one output, weight and bias are alike but for what they are."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 2))
    made = [blk.LaplaceLoRA(model, modules={"0": (leaf,)}) for leaf in ("weight", "bias")]
    weight, bias = (identity(one.model, one.layers, one._forward, one.config)["layers"]["0"] for one in made)
    assert weight["shape"] == bias["shape"] == [1, 1]
    assert weight != bias


# ---- it is another fit's ---------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def refused(folder: Path, match: str, error: type[Exception] = ValueError) -> Any:
    """With this message, and what was there is still there."""
    before = contents(folder)
    with pytest.raises(error, match=match) as raised:
        yield raised
    assert contents(folder) == before
    assert str(folder) in str(raised.value)


def test_other_settings_weights_or_layers(tmp_path):
    stopped("kfac, sampled", tmp_path, 2)

    def again(one: Any = None, setting: str = "kfac, sampled", **settings: Any) -> None:
        one = one or case()
        laplace(one, setting, **settings).fit(one.loader(2), progress=False, checkpoint=tmp_path)

    other = case()
    with torch.no_grad():
        next(p for name, p in other.model.named_parameters() if "lora_B" in name)[0, 0] += 1e-9
    base = case()
    with torch.no_grad():
        base.model.get_base_model().model.norm.weight[0] += 1e-3
    for match, call in {
        "adapter: it has ": lambda: again(other),
        "base_model: it has": lambda: again(base),
        r"settings\.curvature: it has 'kfac', this fit 'exact'": lambda: again(setting="exact"),
        r"settings\.seed: it has 0, this fit 3": lambda: again(seed=3),
        r"layers\..*q_proj.*: it has \{.*\}, this fit None": lambda: again(modules=".*v_proj.*"),
        "class_token_ids: it has ": lambda: again(class_token_ids=[2, 5]),
    }.items():
        with refused(tmp_path, f"the checkpoint of another fit: {match}.*pass another folder, or remove this one"):
            call()
    again(memory_budget=10**9, check="always")  # these change no number


def test_a_device_of_the_same_kind_takes_the_place_of_another(tmp_path):
    """As of a process that takes over what another had on its own GPU."""
    kept = tmp_path / RANK
    identity = {"devices": ["cpu"]}
    with checkpoint_folder.held(kept) as folder:
        folder.write({"devices": ["cuda:1"]}, {"pass 0": [torch.device("cuda:1"), {torch.device("cpu"): 3}]})
    with checkpoint_folder.held(kept) as folder:
        assert folder.read("pass 0") == [torch.device("cuda:1"), {torch.device("cpu"): 3}]
        assert checkpoint._read(folder, "pass 0", identity) == [torch.device("cpu"), {torch.device("cpu"): 3}]
    one = case()
    stopped("exact", tmp_path / "other", 2, one)
    path = tmp_path / "other" / RANK / "checkpoint.json"
    content = json.loads(path.read_text())
    for devices, match in (
        (["cuda:0"], r"devices: it has \['cuda'\], this fit \['cpu'\]"),
        (["cpu", "cpu:1"], "devices"),
    ):
        content["identity"]["devices"] = devices
        path.write_text(json.dumps({**content, "digest": checkpoint_folder._content_digest(content)}))
        with refused(tmp_path / "other", match):
            laplace(one, "exact").fit(one.loader(2), progress=False, checkpoint=tmp_path / "other")


def test_other_data(tmp_path):
    one = case()
    loader = one.loader(2)
    stopped("ekfac", tmp_path, 6, one)
    swapped, changed = [loader[1], loader[0], *loader[2:]], [dict(batch) for batch in loader]
    changed[3]["labels"] = 1 - changed[3]["labels"].clamp(max=1)
    for data, match in {
        "another order": (swapped, "4 batches, and the loader has others, or in another order"),
        "another label": (changed, "4 batches, and the loader has others"),
        "fewer": (loader[:3], "4 batches, and the loader has only 3"),
        "more": ([*loader, loader[0]], "4 batches, and the loader has more than 4"),
    }.values():
        with refused(tmp_path, f"{match}.*shuffle=False, or a generator with a seed.*remove the folder"):
            laplace(one, "ekfac").fit(data, progress=False, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="goes over the data twice"):
        laplace(one, "ekfac").fit(iter(loader), progress=False, checkpoint=tmp_path)


def test_batches_of_all_kinds_are_told_apart():
    from collections import namedtuple

    from bayesian_lora_kernels.curvature.state import batch_digest

    x, pair = torch.arange(6.0), namedtuple("pair", "inputs labels")
    batches = [
        x,
        x.reshape(2, 3),
        x.int(),
        x.bfloat16(),
        x + 1,
        x.numpy(),
        {"a": x},
        {"b": x},
        {"a": x, "b": None},
        (x, x),
        [x, [1, 2]],
        [x, [1, 3]],
        [x, [[1], 2]],
        pair(x, x + 1),
        {"a": ["text"]},
        {"a": ["other"]},
    ]
    digests = [batch_digest("", batch) for batch in batches]
    assert len(set(digests)) == len(batches)
    assert digests == [batch_digest("", batch) for batch in batches]
    assert batch_digest("one", x) != batch_digest("two", x)
    assert batch_digest("", x.reshape(2, 3).T) == batch_digest("", x.reshape(2, 3).T.contiguous())


def test_a_fit_that_counted_nothing_stands_in_nobodys_way(tmp_path):
    one = case()
    with pytest.raises(Stop):
        laplace(one, "exact").fit(Batches(one.loader(2), 0), progress=False, checkpoint=tmp_path, every=1)
    with pytest.raises(ValueError, match="at least one batch"):
        laplace(one, "ekfac").fit([], progress=False, checkpoint=tmp_path)
    laplace(one, "kfac, sampled").fit(one.loader(2), progress=False, checkpoint=tmp_path)


def test_two_fits_into_one_folder(tmp_path):
    one = case()

    def both() -> Any:
        for batch in one.loader(2):
            yield batch
            with pytest.raises(BlockingIOError, match=f"{tmp_path}.*another fit writes its checkpoints there"):
                laplace(one, "exact").fit(one.loader(2), progress=False, checkpoint=tmp_path)

    expected = tensors(laplace(one, "exact").fit(one.loader(2), progress=False))
    found = laplace(one, "exact").fit(both(), progress=False, checkpoint=tmp_path, every=1)
    assert differences(tensors(found), expected) == []


def test_a_loaders_workers_do_not_hold_the_folder(tmp_path):
    """They outlive a killed fit by some seconds."""
    reading, writing = os.pipe()
    with checkpoint_folder.held(tmp_path) as folder:
        folder.write({}, {"fit": None})
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent goes on
            os._exit(0)
    os.close(reading)
    with (
        checkpoint_folder.held(tmp_path),
        pytest.raises(BlockingIOError, match="another fit"),
        checkpoint_folder.held(tmp_path),
    ):
        pass
    os.close(writing)
    os.waitpid(child, 0)


# ---- it cannot be read, or written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["ekfac", "exact"])
def test_damaged_files_are_refused_by_name(setting, tmp_path):
    one = case()
    stopped(setting, tmp_path, 6 if setting == "ekfac" else 3, one)
    files = [path for path in (tmp_path / RANK).iterdir() if path.name != ".lock"]
    assert len(files) == 1 + {"ekfac": 4, "exact": 6}[setting]
    for path in files:
        whole = path.read_bytes()
        lengths = {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}
        damaged = {f"cut to {n}": whole[:n] for n in lengths}
        damaged |= {"longer": whole + b"0"}
        for place in (0, 8, len(whole) // 2, len(whole) - 2):
            changed = bytearray(whole)
            changed[place] ^= 1
            damaged[f"byte {place}"] = bytes(changed)
        for content in damaged.values():
            path.write_bytes(content)
            with refused(tmp_path, f"{path.name}.*(damaged|expected a checkpoint)"):
                laplace(one, setting).fit(one.loader(2), progress=False, checkpoint=tmp_path)
        if path.name != "checkpoint.json":
            path.unlink()
            with refused(tmp_path, f"{path.name}: missing.*remove the folder to start the fit again"):
                laplace(one, setting).fit(one.loader(2), progress=False, checkpoint=tmp_path)
        path.write_bytes(whole)
    laplace(one, setting).fit(one.loader(2), progress=False, checkpoint=tmp_path)


def test_what_a_killed_writing_left_is_removed(tmp_path):
    one = case()
    stopped("exact", tmp_path, 2, one)
    left = [tmp_path / RANK / "writing", tmp_path / RANK / "pass-0-9.safetensors"]
    left[0].mkdir()
    for path in (left[0] / "fit-4.safetensors", left[1]):
        path.write_bytes(b"half of it")

    def batches() -> Any:
        assert not any(path.exists() for path in left)
        yield from one.loader(2)

    laplace(one, "exact").fit(batches(), progress=False, checkpoint=tmp_path)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version(version, tmp_path):
    """Also an earlier one, which did not know of the targets of a regression."""
    one = case()
    stopped("exact", tmp_path, 2, one)
    path = tmp_path / RANK / "checkpoint.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": version}))
    with refused(tmp_path, f"format version {version}, this package reads version 2"):
        laplace(one, "exact").fit(one.loader(2), progress=False, checkpoint=tmp_path)


@contextmanager
def as_nobody() -> Any:
    """Without the rights of root, for whom every folder is writable."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_to():
    one = mlp()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        read = Batches(one.loader(2))
        with as_nobody(), pytest.raises(PermissionError, match=folder):
            blk.LaplaceLoRA(one.model).fit(read, progress=False, checkpoint=folder)
        assert read.given == 0
        (Path(folder) / "file").touch()
        with pytest.raises(OSError, match="file"):
            blk.LaplaceLoRA(one.model).fit(one.loader(2), progress=False, checkpoint=Path(folder) / "file")


def test_a_full_disk(tmp_path, monkeypatch):
    """At once it is an error, later a warning; what stood stands, and nothing half-written is left."""
    one = case()
    expected = tensors(laplace(one, "exact").fit(one.loader(2), progress=False))
    full, save = [True], checkpoint_folder.save_file

    def planted(tensors: Any, path: Path) -> None:
        save(tensors, path)
        if full[0]:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "save_file", planted)
    with pytest.raises(OSError, match="No space left"):
        laplace(one, "exact").fit(one.loader(2), progress=False, checkpoint=tmp_path)
    assert [path for path in contents(tmp_path) if "lock" not in path] == []
    full[0] = False

    def full_at_the_first_sums() -> Any:
        for batch in one.loader(2):
            full[0] = True
            yield batch

    with pytest.raises(OSError, match="No space left"):
        laplace(one, "exact").fit(full_at_the_first_sums(), progress=False, checkpoint=tmp_path, every=1)

    def filling() -> Any:
        for i, batch in enumerate(one.loader(2)):
            full[0] = i >= 2
            if i == 3:
                assert "pass-0-3.safetensors" in {path.name for path in (tmp_path / RANK).iterdir()}
                assert not (tmp_path / RANK / "writing").exists()
            yield batch

    full[0] = False
    with pytest.warns(UserWarning, match="after batch [23] could not be written .*No space.*the fit goes on"):
        found = laplace(one, "exact").fit(filling(), progress=False, checkpoint=tmp_path, every=1)
    assert differences(tensors(found), expected) == []

    def stopping() -> Any:
        for i, batch in enumerate(one.loader(2)):
            full[0] = i >= 2
            if i == 3:
                raise Stop
            yield batch

    full[0] = False
    with pytest.warns(UserWarning, match="after batch 2 could not"), pytest.raises(Stop):
        laplace(one, "exact").fit(stopping(), progress=False, checkpoint=tmp_path, every=1)
    full[0] = False
    with counted(one.model) as ran:
        found = laplace(one, "exact").fit(one.loader(2), progress=False, checkpoint=tmp_path)
    assert differences(tensors(found), expected) == []
    assert len(ran) == 2, "the first two batches are in the checkpoint that stood"


# ---- kinds of curvature of one's own ---------------------------------------------------------------------------------


def test_a_kind_that_does_not_say_what_to_keep_is_refused(tmp_path, monkeypatch):
    from test_curvature_of_ones_own import DiagonalCurvature

    from bayesian_lora_kernels.posterior.curvature import CURVATURES

    monkeypatch.setitem(CURVATURES, "diagonal", DiagonalCurvature)
    one = mlp()
    with pytest.raises(ValueError, match=r"curvature='diagonal' does not say what to keep of its sums.*state\(\)"):
        blk.LaplaceLoRA(one.model, curvature="diagonal").fit(one.loader(2), progress=False, checkpoint=tmp_path)

    class Kept(dict[str, torch.Tensor]):
        def state(self) -> dict[str, torch.Tensor]:
            return dict(self)

        def restore(self, state: dict[str, torch.Tensor]) -> None:
            self.update(state)

    class Keeping(DiagonalCurvature):
        @classmethod
        def measure(cls, data: Any) -> Any:
            total = Kept({layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in data.layers})
            for gradients in data.weight_gradients("diagonal", [total]):
                for name, gradient in gradients.items():
                    total[name] += gradient.double().square().sum(dim=0)
            return cls(total)

    monkeypatch.setitem(CURVATURES, "diagonal", Keeping)
    expected = tensors(blk.LaplaceLoRA(one.model, curvature="diagonal").fit(one.loader(2), progress=False))
    with pytest.raises(Stop):
        blk.LaplaceLoRA(one.model, curvature="diagonal").fit(
            Batches(one.loader(2), 1), progress=False, checkpoint=tmp_path, every=1
        )
    found = blk.LaplaceLoRA(one.model, curvature="diagonal")
    found.fit(one.loader(2), progress=False, checkpoint=tmp_path)
    assert differences(tensors(found), expected) == []
