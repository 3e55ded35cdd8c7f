"""What one process of several says of a model that FSDP2 shards over them; `test_sharded.py` starts them.

Each scene is a function of a model's builder and of how it is made ready (sharded, or left whole), and gives tensors;
the test compares what it gives here with what it gives on the whole model in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from models import in_float64
from situations import IDS, LLAMA, adapted, labelled, padded
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.sharding import together
from bayesian_lora_kernels.processes import ALONE

BATCHES = [labelled(padded([6, 4, 5, 6], 40)), labelled(padded([3, 5], 40, seed=4))]
Ready = Callable[[nn.Module], nn.Module]
Scene = Callable[[Ready, Path], dict[str, Tensor]]


class Plain(nn.Module):
    """Weights and biases, of sizes that two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def llama(causal: bool = True, **lora: Any) -> Any:
    torch.manual_seed(0)
    if causal:
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        return in_float64(adapted(model, ["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora))
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=3))
    return in_float64(adapted(model, ["q_proj", "v_proj"], task_type="SEQ_CLS", **lora))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain().double()


def numbers(laplace: blk.LaplaceLoRA, batch: Any) -> dict[str, Tensor]:
    """All that a fit says."""
    noise = torch.Generator().manual_seed(0)
    prediction = laplace.predict(batch)
    found = {
        "mean": prediction.mean,
        "covariance": prediction.covariance,
        "evidence": laplace.log_marginal_likelihood(0.3),
        "scale": torch.tensor(laplace.variance_scale),
    }
    found |= {f"sampled {name}": value for name, value in laplace.sample_weights(2, noise).items()}
    laplace.optimize_prior_precision(per_module=True)
    return found | {f"prior of {name}": value for name, value in laplace.prior_precision.items()}  # type: ignore[union-attr]


def fitted(build: Callable[[], Any], batches: list[Any], **settings: Any) -> Scene:
    def scene(ready: Ready, folder: Path) -> dict[str, Tensor]:
        model = ready(build())
        laplace = blk.LaplaceLoRA(model, **{"rank": None, "fisher": "exact", **settings}).fit(batches, progress=False)
        found = numbers(laplace, batches[0])
        assert all(p.grad is None for p in model.parameters())
        return found

    return scene


def moved(ready: Ready, folder: Path) -> dict[str, Tensor]:
    """Saved by one process, loaded by all, calibrated there."""
    laplace = blk.LaplaceLoRA(ready(llama()), class_token_ids=IDS, rank=4, rank_threshold=8)
    laplace.fit(BATCHES, progress=False)
    if not dist.is_initialized() or dist.get_rank() == 0:
        laplace.save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    model = llama()
    for p in model.parameters():
        p.requires_grad_(False)
    loaded = blk.LaplaceLoRA.from_pretrained(ready(model), folder)
    loaded.calibrate(BATCHES, progress=False)
    return {
        **numbers(laplace, BATCHES[1]),
        "covariance of the loaded": loaded.predict(BATCHES[1]).covariance,
        "calibrated": loaded.predict(BATCHES[0]).probs(),
    }


def in_pieces(ready: Ready, folder: Path) -> dict[str, Tensor]:
    """The first process has less memory than the others: all cut alike."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    model = ready(llama(causal=False))
    budget = 1 if first else None
    return numbers(blk.LaplaceLoRA(model, memory_budget=budget).fit(BATCHES, progress=False), BATCHES[0])


def trained_on(ready: Ready, folder: Path) -> dict[str, Tensor]:
    """Between a fit and the next, a step of training; a fit that fails in the middle is survived."""
    model = ready(llama(causal=False))
    laplace = blk.LaplaceLoRA(model, rank=None).fit(BATCHES, progress=False)
    before = laplace.predict(BATCHES[0]).covariance
    broken = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(_fail)
    refusal = refused(lambda: laplace.fit(BATCHES, progress=False))
    broken.remove()
    assert "half-way" in refusal
    again = laplace.predict(BATCHES[0]).covariance
    model.train()
    model(**BATCHES[0]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.zero_grad()
    stale = refused(lambda: laplace.predict(BATCHES[0]))
    assert "have changed" in stale, stale
    laplace.fit(BATCHES, progress=False)
    return {"before": before, "again": again, "trained": laplace.predict(BATCHES[0]).covariance}


def _fail(*_: Any) -> None:
    raise ValueError("half-way")


def mixed(ready: Ready, folder: Path) -> dict[str, Tensor]:
    """Computed in bfloat16, if it is sharded so."""
    model = ready(llama(causal=False).float())
    laplace = blk.LaplaceLoRA(model, rank=None, fisher="exact").fit(BATCHES, progress=False)
    return {"covariance": laplace.predict(BATCHES[0]).covariance}


def refused(run: Callable[[], Any]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"


SCENES: dict[str, Scene] = {
    "classes": fitted(lambda: llama(causal=False), BATCHES),
    "classes, EKFAC": fitted(lambda: llama(causal=False), BATCHES, curvature="ekfac"),
    "classes, exact": fitted(lambda: llama(causal=False), BATCHES, curvature="exact"),
    "tokens": fitted(llama, BATCHES, class_token_ids=IDS),
    "checkpointed": fitted(lambda: checkpointed(), BATCHES, class_token_ids=IDS),
    "DoRA": fitted(lambda: llama(use_dora=True), BATCHES, class_token_ids=IDS),
    "sampled": fitted(lambda: llama(causal=False), BATCHES, fisher="mc"),
    "plain": fitted(plain, [(torch.ones(4, 5).double().cumsum(0).sin(), torch.arange(4) % 3)]),
    "moved": moved,
    "pieces": in_pieces,
    "trained": trained_on,
    "mixed": mixed,
}


def checkpointed() -> Any:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def sharded(mesh: Any, policy: Any = None) -> Ready:
    """Every block by itself, and the rest."""
    from torch.distributed.fsdp import fully_shard

    def ready(model: nn.Module) -> nn.Module:
        settings = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
        inner = getattr(getattr(model, "get_base_model", lambda: model)(), "model", None)
        for layer in getattr(inner, "layers", []):
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        return model

    return ready


def replicated(rank: int) -> dict[str, Tensor]:
    """DistributedDataParallel: every process by itself, with more data on one than on the other; training goes on."""
    model = nn.parallel.DistributedDataParallel(llama(causal=False))
    laplace = blk.LaplaceLoRA(model, rank=None, fisher="exact").fit(BATCHES[: 1 + rank], progress=False)
    found = numbers(laplace, BATCHES[0])
    model.train()
    model(**BATCHES[rank]).loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    return found | {f"gradient of {name}": g for name, g in gradients.items()}


def hybrid(rank: int, size: int) -> dict[str, Tensor]:
    """HSDP: copies of a model, each shared by `size / 2` processes; each copy has data of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh)(llama(causal=False))
    laplace = blk.LaplaceLoRA(model, rank=None, fisher="exact")
    copy = mesh.get_local_rank("replicate")
    laplace.fit(BATCHES[copy : copy + 1], progress=False, group=mesh.get_group("replicate"))
    return numbers(laplace, BATCHES[0])


def refusals(ready: Ready) -> dict[str, str]:
    """What every process says of what cannot be: none of them may hang."""
    rank = dist.get_rank()
    model = ready(llama())
    laplace = blk.LaplaceLoRA(model, class_token_ids=IDS, rank=None)
    data: dict[str, Any] = {
        "other batches": [BATCHES[0], BATCHES[rank]],
        "another number": BATCHES[: 1 + rank],
        "a loader that fails": failing(rank),
    }
    found = {name: refused(lambda b=batches: laplace.fit(b, progress=False)) for name, batches in data.items()}
    found["shards as a group"] = refused(lambda: laplace.fit(BATCHES, progress=False, group=dist.group.WORLD))
    laplace.fit(BATCHES, progress=False)
    found["another batch to predict"] = refused(lambda: laplace.predict(BATCHES[rank]))
    found["a checkpoint"] = refused(lambda: laplace.fit(BATCHES, progress=False, checkpoint="nowhere"))

    def interrupted() -> None:  # behind the passes of a batch
        with together(model, ALONE):
            laplace.predict(BATCHES[0])
            if rank == 1:
                raise ValueError("no space left")
            laplace.predict(BATCHES[1])

    found["a failure between batches"] = refused(interrupted)
    found["score"] = refused(lambda: laplace.score(BATCHES[0]))
    found["vocabulary"] = refused(lambda: laplace.predict(BATCHES[0], outputs="vocabulary"))
    found["verify"] = refused(lambda: laplace.verify(BATCHES[0]))
    return found


def failing(rank: int) -> Any:
    yield BATCHES[0]
    if rank == 1:
        raise ValueError("no such file")
    yield BATCHES[1]


def main(rank: int, size: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    half = sharded(mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    results: dict[str, Any] = {}
    for name, scene in SCENES.items():
        results[name] = scene(half if name == "mixed" else sharded(mesh), folder)
    results["replicated"] = replicated(rank)
    results["hybrid"] = hybrid(rank, size)
    results["refusals"] = refusals(sharded(mesh))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
