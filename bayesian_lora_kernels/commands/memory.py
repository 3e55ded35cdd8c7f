"""`blk doctor --batch-size N --length T`: what a fit and a prediction will need, before any weight is loaded."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

import torch
from torch import nn

from bayesian_lora_kernels.commands.adapter import CAUSAL_LM, TASKS, AdapterFolder, choose_device, open_adapter
from bayesian_lora_kernels.commands.errors import InputError, as_failures, as_input_errors, loading
from bayesian_lora_kernels.commands.options import VOCABULARY
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.memory_estimate import estimate_memory, readable
from bayesian_lora_kernels.model.memory import free_bytes
from bayesian_lora_kernels.posterior.prior import Prior


def estimate(args: Namespace) -> tuple[str, dict[str, Any]]:
    """What is to be printed, and the same in values that JSON can hold.

    Raises:
        InputError: for whatever the user has to put right.
    """
    if args.batch_size is None or args.length is None:
        raise InputError("--batch-size, --length: expected both, or neither")
    folder = open_adapter(args.adapter, args.model, tuple(TASKS), weights=False)
    device = choose_device(args.device)
    free = free_bytes(device)
    model = model_without_weights(folder, args.dtype, args.outputs)
    size = sum(p.nbytes for p in model.parameters())
    budget = args.budget or max((free - size) // 2, 1)
    config, batch = _asked(folder, args, budget)
    with as_failures(RuntimeError), as_input_errors():
        found = estimate_memory(
            model,
            None,
            config,
            Prior(1.0),
            batch,
            outputs="vocabulary" if args.outputs == VOCABULARY else None,
            n_examples=args.examples,
            device=device,
        )
    needs = {use: parts.get(str(device), 0) for use, parts in (("fit", found.fit), ("predict", found.predict))}
    fits = {use: need <= free for use, need in needs.items()}
    verdict = ", ".join(f"{use} {'fits' if fits[use] else 'DOES NOT FIT'}" for use in fits)
    text = (
        f"{args.batch_size} texts of {args.length} tokens, curvature {args.curvature}, {args.outputs} logits\n{found}\n"
        f"{device} has {readable(free)} free: {verdict}"
    )
    asked = {name: getattr(args, name) for name in ("batch_size", "length", "curvature", "outputs")}
    return text, {**asked, **found.as_dict(), "free": {str(device): free}, "fits": fits}


def model_without_weights(folder: AdapterFolder, dtype: str, outputs: int | str) -> nn.Module:
    """The base model and the adapter on the meta device, of which nothing but the configurations is read.

    Raises:
        InputError: if one of these cannot be read, or is for something else.
    """
    import peft
    import transformers

    config = folder.base_config()
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{folder.base}: it is quantised, and what its weights take is not in its config.json")
    kind: Any = transformers.AutoModelForCausalLM
    if folder.task != CAUSAL_LM:
        if outputs == VOCABULARY:
            raise InputError(f"--outputs: {folder.folder} is for {TASKS[folder.task]}, which has no vocabulary")
        kind, config.num_labels = transformers.AutoModelForSequenceClassification, outputs
        config.pad_token_id = 0
    saved = getattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None) or torch.float32
    wanted = saved if dtype == "auto" else getattr(torch, dtype)
    with loading(f"base model {folder.base}"), torch.device("meta"):
        base = kind.from_config(config).to(wanted)
    with loading(f"adapter {folder.folder}"), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of a base without a name
        lora: Any = peft.PeftConfig.from_pretrained(str(folder.folder))
        lora.inference_mode, lora.init_lora_weights = False, True  # others start from the base's weights
        return peft.get_peft_model(base, lora)


def _asked(folder: AdapterFolder, args: Namespace, budget: int) -> tuple[LaplaceConfig, dict[str, Any]]:
    """The settings, and a batch of the size that was named."""
    shape = args.batch_size, args.length
    batch = {"input_ids": torch.ones(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)}
    settings: dict[str, Any] = {"curvature": args.curvature, "memory_budget": budget}
    if args.outputs == VOCABULARY:
        batch["labels"] = batch["input_ids"]
    elif args.outputs == 1:
        batch["labels"], settings["likelihood"] = torch.zeros(args.batch_size, 1), "regression"
    else:
        batch["labels"] = torch.zeros(args.batch_size, dtype=torch.long)
    if folder.task == CAUSAL_LM and args.outputs != VOCABULARY:
        settings["class_token_ids"] = range(args.outputs)
    with as_input_errors():
        return LaplaceConfig(**settings), batch
