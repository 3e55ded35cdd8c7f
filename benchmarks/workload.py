"""What the benchmarks run: a random Llama with LoRA, its batches, and one posterior in both packages' terms.

Nothing of bayesian_lora is copied here: its functions are imported and called with what they accept.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.demo.smollm2 import load_smollm2

Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Workload:
    """The sizes; the defaults are those of the project's speed target."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    key_value_heads: int | None = None  # None: as many as heads
    feed_forward: int = 1376
    # Small on purpose: bayesian_lora computes the logits of every token and position, we do not.
    vocabulary: int = 1000
    lora_rank: int = 8
    examples: int = 8
    tokens: int = 64
    classes: int = 4
    kept: int = 10  # columns of a low-rank factor that both packages predict with
    attention: str = "sdpa"  # transformers' default
    pretrained: bool = False  # SmolLM2-135M, whose sizes these must then be

    @property
    def class_token_ids(self) -> Tensor:
        return torch.arange(5, 5 + self.classes)

    @property
    def value_width(self) -> int:
        """Of what v_proj puts out: the narrowest of the wide sides of the adapters."""
        return self.width * (self.key_value_heads or self.heads) // self.heads

    def model(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype = torch.float32
    ) -> peft.PeftModel:
        """A random model, made where it is to lie, or SmolLM2; LoRA B, which PEFT starts at zero, is random in either
        case, or no gradient would reach LoRA A.
        """
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=max(128, self.tokens),
            attn_implementation=self.attention,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                base = load_smollm2()[0].to(device, dtype) if self.pretrained else transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        lora = peft.LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT would take adapters of a half-precision model to float32.
            model = peft.get_peft_model(base, lora, autocast_adapter_dtype=adapter_dtype == torch.float32)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.eval()

    def batches(self, count: int, seed: int = 1) -> list[dict[str, Tensor]]:
        """Random token ids without padding, with class labels."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.examples, self.tokens)
        return [
            {
                "input_ids": torch.randint(self.vocabulary, shape, generator=generator),
                "attention_mask": torch.ones(shape, dtype=torch.long),
                "labels": torch.randint(self.classes, shape[:1], generator=generator),
            }
            for _ in range(count)
        ]

    def published_posterior(self, model: peft.PeftModel) -> LaplaceLoRA:
        """Ours in the published form, which is all that bayesian_lora's `variance` can express: no tail."""
        laplace = LaplaceLoRA(model, class_token_ids=self.class_token_ids, fisher="mc", rank=self.kept, tail=False)
        return laplace.fit(self.batches(8), progress=False)


SMOLLM2 = Workload(
    layers=30,
    width=576,
    heads=9,
    key_value_heads=3,
    feed_forward=1536,
    vocabulary=49152,
    classes=2,
    pretrained=True,
)


def published_factors(laplace: LaplaceLoRA, workload: Workload, device: str = "cpu") -> Factors:
    """The same factors as bayesian_lora takes them: the small ones by their Cholesky factor."""
    from bayesian_lora import cholesky_decompose_small_factors

    factors = {name: (factor.a.clone(), factor.s.clone()) for name, factor in laplace.factors.items()}
    decomposed: Factors = cholesky_decompose_small_factors(factors, workload.value_width, device, torch.float32)
    return decomposed


def published_prediction(
    model: peft.PeftModel, batch: Mapping[str, Tensor], factors: Factors, workload: Workload, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Mean and covariance from bayesian_lora's `jacobian_mean` and `variance`, under `no_grad` as its README has it.

    Its own way to choose logits (`target_ids`) raises NameError, so they are chosen by `output_callback`. Weights and
    inputs are those of our call, and the prior variance is 1.
    """
    from bayesian_lora.main import jacobian_mean, variance

    inputs = transformers.BatchEncoding({key: value for key, value in batch.items() if key != "labels"})
    ids = workload.class_token_ids.to(device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a missing batching rule of PyTorch's vmap
        jacobian, mean = jacobian_mean(model, inputs, output_callback=lambda outputs: outputs.logits[:, -1, ids])
        covariance = variance(
            inputs,
            jacobian,
            factors,
            torch.tensor(1.0, device=device),
            workload.classes,
            workload.lora_rank,
            workload.kept,
            device,
        )
    return mean.detach(), covariance


def published_fit(model: peft.PeftModel, batches: list[dict[str, Tensor]], rank: int, ids: Tensor) -> Factors:
    """bayesian_lora's pass over the data. It sees the last token only, 8 rows per batch where we see 512."""
    from bayesian_lora import calculate_kronecker_factors

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1
        ).logits
        return logits[:, -1, ids]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on its use of full backward hooks
        factors: Factors = calculate_kronecker_factors(
            model, forward, batches, n_kfac=rank, lr_threshold=256, target_module_keywords=["lora"]
        )
    model.eval()  # it leaves train mode on
    model.zero_grad()
    return factors


def plain_pass(model: peft.PeftModel, batches: list[dict[str, Tensor]], ids: Tensor) -> None:
    """What training does without its optimiser: forward and backward of the same batches, to the LoRA parameters."""
    for batch in batches:
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1, ids]
        F.cross_entropy(logits, batch["labels"], reduction="sum").backward()
        model.zero_grad()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


def environment() -> dict[str, Any]:
    """What a measurement depends on besides the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
