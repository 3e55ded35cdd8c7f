"""A model that FSDP2 shards over two processes says what the whole model says; what is spread otherwise is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist
from dense import relative
from torch import nn

import bayesian_lora_kernels as blk

pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")
HERE = Path(__file__).parent
TOLERANCE = 1e-8


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes says."""
    folder = tmp_path_factory.mktemp("sharded")
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "sharded.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=300)[1].decode()[-4000:] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last digits; the best prior, where the evidence is flat, to half of them."""
    off = {key: relative(found[key], value) for key, value in expected.items()}
    limits = {key: 1e-6 if key.startswith("prior of") else TOLERANCE for key in off}
    assert all(error <= limits[key] for key, error in off.items()), off


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in sharded.SCENES if name != "mixed"])
def test_sharded_as_whole(name: str, found: list[dict[str, Any]], tmp_path: Path):
    expected = sharded.SCENES[name](lambda model: model, tmp_path)
    for values in found:
        assert values[name].keys() == expected.keys()
        agree(values[name], expected)


@pytest.mark.filterwarnings("ignore")
def test_every_process_says_the_same(found: list[dict[str, Any]]):
    first, second = found
    for name in sharded.SCENES:
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)


@pytest.mark.filterwarnings("ignore")
def test_a_mixed_precision_policy(found: list[dict[str, Any]], tmp_path: Path):
    """As a model in bfloat16: close to float32, and not the same."""
    expected = sharded.mixed(lambda model: model, tmp_path)["covariance"]
    off = relative(found[0]["mixed"]["covariance"], expected)
    assert 1e-4 < off < 0.1, off


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [0, 1])
def test_replicated_by_ddp(rank: int, found: list[dict[str, Any]]):
    """Each process has its own posterior, of its own data, and the gradients of training are averaged as before."""
    model = sharded.llama(causal=False)
    laplace = blk.LaplaceLoRA(model, rank=None, fisher="exact").fit(sharded.BATCHES[: 1 + rank], progress=False)
    expected = sharded.numbers(laplace, sharded.BATCHES[0])
    values = {key.replace(".module.", ".").replace(" module.", " "): v for key, v in found[rank]["replicated"].items()}
    agree(values, expected)
    for batch in sharded.BATCHES:
        (model(**batch).loss / 2).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert relative(values[f"gradient of {name}"], p.grad) <= TOLERANCE, name


@pytest.mark.filterwarnings("ignore")
def test_copies_of_a_model_have_data_of_their_own(found: list[dict[str, Any]]):
    """HSDP: the processes that hold copies share the data."""
    model = sharded.llama(causal=False)
    laplace = blk.LaplaceLoRA(model, rank=None, fisher="exact").fit(sharded.BATCHES, progress=False)
    expected = sharded.numbers(laplace, sharded.BATCHES[0])
    for values in found:
        agree(values["hybrid"], expected)


REFUSED = {
    "other batches": "batch 1: FSDP",
    "another number": "no more",
    "a loader that fails": "no such file",
    "another batch to predict": "batch 0: FSDP",
    "shards as a group": "group: FSDP shards the model over the processes [0, 1]",
    "score": "score: not for a model that FSDP",
    "vocabulary": "FSDP",
    "verify": "verify: not for a model that FSDP",
}


@pytest.mark.parametrize("what", REFUSED)
def test_processes_that_are_not_in_step(what: str, found: list[dict[str, Any]]):
    for values in found:
        assert REFUSED[what] in values["refusals"][what]


# What is spread in another way


@pytest.fixture(scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    if dist.is_initialized():
        pytest.skip("needs torch.distributed to itself")
    place = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(sharded.plain(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        blk.LaplaceLoRA(model)


@pytest.mark.usefixtures("_group")
def test_zero_3():
    model = sharded.plain()
    model.first.weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
    with pytest.raises(ValueError, match=r"first\.weight: DeepSpeed ZeRO-3"):
        blk.LaplaceLoRA(model)


@pytest.mark.usefixtures("_group")
def test_tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = parallelize_module(sharded.plain(), init_device_mesh("cpu", (1,)), {"first": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"first\.weight: it is a DTensor .*tensor parallel"):
        blk.LaplaceLoRA(model)


@pytest.mark.usefixtures("_group")
def test_sharded_after_it_was_wrapped(tmp_path: Path):
    """fully_shard between construction and fit, of some modules and of the outermost alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    batch = (torch.ones(4, 5).double().cumsum(0).sin(), torch.arange(4) % 3)
    expected = blk.LaplaceLoRA(sharded.plain(), rank=None).fit([batch], progress=False).predict(batch).covariance
    model: nn.Module = sharded.plain()
    laplace = blk.LaplaceLoRA(model, rank=None)
    fully_shard(model, mesh=mesh)
    covariance = laplace.fit([batch], progress=False).predict(batch).covariance
    assert relative(covariance, expected) < TOLERANCE
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    with torch.no_grad():
        model(batch[0])  # leaves the outermost parameters whole
    assert not any(hasattr(p, "full_tensor") for p in model.parameters())
    assert relative(laplace.predict(batch).covariance, expected) < TOLERANCE
    laplace.save_pretrained(tmp_path)
