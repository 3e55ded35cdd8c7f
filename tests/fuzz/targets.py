"""What is given damaged files: a saved posterior, and an adapter folder with a posterior in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random
from typing import Any

import peft
import torch
import transformers
from models import Case, llama, mlp
from test_commands import WORDS, save_tokenizer
from torch import Tensor

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.commands.adapter import open_adapter
from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.commands.tokens import tokenise_text
from bayesian_lora_kernels.posterior import storage
from fuzz.mutations import mutate

CPU = torch.device("cpu")


class Target(ABC):
    """A folder of files, and what reads them.

    Args:
        scratch: an empty folder of its own.
    """

    def __init__(self, scratch: Path):
        self.whole, self.folder, self.again = (scratch / name for name in ("whole", "damaged", "again"))

    def damage(self, random: Random) -> None:
        """A fresh copy of the files, one or two of them changed."""
        for folder in (self.folder, self.again):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, self.folder)
        for _ in range(random.choice((1, 1, 1, 2))):
            paths = sorted(path for path in self.folder.iterdir() if path.is_file() and not path.is_symlink())
            mutate(random.choice(paths), random)

    @abstractmethod
    def read(self) -> str:
        """`refused` or `read`, of the damaged files; any other end is a finding.

        Raises:
            AssertionError: for numbers that are not those of the whole files.
            Exception: any error that is none of those that are documented.
        """


class Posterior(Target):
    """`LaplaceLoRA.from_pretrained`.

    Args:
        scratch: see `Target`.
        curvature: its kind.
        sealed: whether checksums are made right again after the damage, so that all else is looked at.
    """

    def __init__(self, scratch: Path, curvature: str, sealed: bool):
        super().__init__(scratch)
        self.sealed = sealed
        self.case: Case = mlp() if curvature != "kfac" else llama(targets=("q_proj", "k_proj"), layers=1)
        self.laplace = blk.LaplaceLoRA(self.case.model, curvature=curvature, **self.case.arguments)
        self.laplace.fit(self.case.loader(2), progress=False).calibrate(self.case.loader(2), progress=False)
        self.laplace.save_pretrained(self.whole)

    def damage(self, random: Random) -> None:
        super().damage(random)
        if self.sealed:
            seal(self.folder)

    def read(self) -> str:
        try:
            found = blk.LaplaceLoRA.from_pretrained(self.case.model, self.folder)
        except (ValueError, OSError) as error:
            require(str(self.folder) in str(error), f"the error does not name the folder: {error!r}")
            return "refused"
        if not self.sealed:
            require_equal(found, self.laplace)
            return "read"
        prediction = found.predict(self.case.batch())
        require(torch.isfinite(prediction.covariance).all(), "a covariance that is not finite")
        require((prediction.variance >= 0).all(), "a variance that is negative")
        if found.log_likelihood is not None:
            require(torch.isfinite(found.log_marginal_likelihood()), "an evidence that is not finite")
        found.save_pretrained(self.again)
        require_equal(blk.LaplaceLoRA.from_pretrained(self.case.model, self.again), found)
        return "read"


class Adapter(Target):
    """What `blk` does with an adapter folder, up to the posterior in it."""

    def __init__(self, scratch: Path):
        super().__init__(scratch)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(vocab_size=len(WORDS), initializer_range=0.3, pad_token_id=0, **sizes)
        self.base = scratch / "base"
        transformers.LlamaForCausalLM(config).save_pretrained(self.base)
        base = transformers.AutoModelForCausalLM.from_pretrained(self.base)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(self.whole)
        (self.whole / "README.md").unlink()
        save_tokenizer(self.whole)
        self.batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "labels": torch.tensor([0, 1])}
        self.laplace = blk.LaplaceLoRA(model.eval(), class_token_ids=[3, 4]).fit([self.batch], progress=False)
        self.laplace.save_pretrained(self.whole)

    def read(self) -> str:
        try:
            adapter = open_adapter(self.folder, str(self.base))
            tokenizer = adapter.tokenizer()
            tokenise_text(tokenizer, "red fish")
            model = adapter.model(CPU, "auto")
        except InputError as error:
            named = any(str(name) in str(error) for name in (self.folder, self.base, "tokenizer", "the text"))
            require(named, f"the error names no file: {error!r}")
            return "refused"
        try:
            found = blk.LaplaceLoRA.from_pretrained(model, self.folder)
        except (ValueError, OSError) as error:
            del error  # it names a folder, or what of the adapter is not as it was
            return "refused"
        require_equal(found, self.laplace)
        one, other = (laplace.predict(self.batch) for laplace in (found, self.laplace))
        require(torch.equal(one.mean, other.mean), "another mean")
        require(torch.equal(one.covariance, other.covariance), "another covariance")
        return "read"


def targets(scratch: Path) -> list[Target]:
    """All there are; the larger share of what is tried goes to posteriors."""
    kinds = [(curvature, sealed) for curvature in ("kfac", "ekfac", "exact") for sealed in (False, True)]
    found: list[Target] = []
    for index, (curvature, sealed) in enumerate(kinds):
        found.append(Posterior(scratch / str(index), curvature, sealed))
    return [*found, Adapter(scratch / "adapter")]


def seal(folder: Path) -> None:
    """Make the checksums right, as far as there is something to make right."""
    path = folder / storage.JSON_NAME
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        tensors = folder / content["tensors"]["file"]
        if tensors.is_file() and folder in tensors.parents:
            content["tensors"]["sha256"] = hashlib.sha256(tensors.read_bytes()[: 2**20]).hexdigest()
        content["sha256"] = storage.content_digest(content)
        path.write_text(json.dumps(content))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return


def require(fact: Any, finding: str) -> None:
    """What must be so.

    Raises:
        AssertionError: if it is not.
    """
    if not fact:
        raise AssertionError(finding)


def require_equal(one: blk.LaplaceLoRA, other: blk.LaplaceLoRA) -> None:
    """Whether two posteriors are the same in every number."""
    require(numbers(one).keys() == numbers(other).keys(), "other tensors")
    for name, value in numbers(other).items():
        found = numbers(one)[name]
        require(torch.equal(found, value) if isinstance(value, Tensor) else found == value, f"another {name}")


def numbers(laplace: blk.LaplaceLoRA) -> dict[str, Any]:
    """All that a file keeps."""
    packed, described = laplace.posterior.curvature.pack()
    calibration = laplace.calibration
    return {
        **{name: x if isinstance(x, Tensor) else x.read(slice(None)) for name, x in packed.items()},
        "described": described,
        "settings": laplace.config.as_json(),
        "precision": {name: float(laplace.prior[name]) for name in laplace.posterior.curvature.shapes},
        "examples": (laplace.n_examples, laplace.log_likelihood),
        "calibration": None if calibration is None else calibration.as_json(),
    }
