"""`blk doctor` on the configurations of some models, no weights at all: the examples in docs/memory.md.

`python -m benchmarks.memory_of_models --write docs/memory.md` puts what it prints between that file's markers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import transformers

from bayesian_lora_kernels.cli import main as blk

BEGIN, END = "<!-- doctor -->\n", "<!-- end -->"
TARGETS = ("q_proj", "v_proj")
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
# What is printed above each table, the model, its dtype, and the options.
EXAMPLES: Sequence[tuple[str, dict[str, Any], str, Sequence[str]]] = (
    ("SmolLM2-135M, float32", SMOLLM2, "float32", ("--batch-size", "8", "--length", "128")),
    (
        "SmolLM2-135M, the exact curvature of 1,000 examples",
        SMOLLM2,
        "float32",
        ("--batch-size", "8", "--length", "128", "--curvature", "exact", "--examples", "1000"),
    ),
    ("A Llama of 7B, bfloat16", LLAMA_7B, "bfloat16", ("--batch-size", "4", "--length", "512", "--budget", "16GB")),
    ("A Llama of 70B, bfloat16", LLAMA_70B, "bfloat16", ("--batch-size", "1", "--length", "512", "--budget", "16GB")),
)


def example(folder: Path, config: dict[str, Any], dtype: str, options: Sequence[str]) -> str:
    """What `blk doctor` says of memory."""
    transformers.LlamaConfig(**config, max_position_embeddings=8192, dtype=dtype).save_pretrained(folder / "base")
    lora = peft.LoraConfig(r=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(folder / "base")
    lora.save_pretrained(folder / "adapter")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        blk(["doctor", "--adapter", str(folder / "adapter"), *options])
    table = printed.getvalue().rpartition(f"{folder / 'adapter'}\n")[2].strip()
    return table.rpartition("\n")[0]  # the last line is about this machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it between the markers of this file")
    arguments = parser.parse_args()
    parts = []
    for title, config, dtype, options in EXAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            parts.append(
                f"{title} (`{' '.join(options)}`):\n\n```\n{example(Path(folder), config, dtype, options)}\n```\n"
            )
        print(parts[-1], flush=True)
    if arguments.write is not None:
        text = arguments.write.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.write.write_text(before + BEGIN + "\n".join(parts) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
