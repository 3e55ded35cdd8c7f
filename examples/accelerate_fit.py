"""One posterior from several processes, each with a share of the data:

    torchrun --nproc_per_node 2 examples/accelerate_fit.py [FOLDER]      # or: accelerate launch --num_processes 2 ...

Runs as it stands, on CPUs too, and downloads nothing.
"""

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bayesian_lora_kernels as blk

accelerator = Accelerator(cpu=not torch.cuda.is_available())

# Stands for your own model and data, the same on every process.
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=8, initializer_range=0.1, **sizes))
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
texts = torch.randint(2, 4, (320, 9))
labels = ((texts == 3).sum(1) > 4).long()
examples = list(zip(texts, labels, strict=True))


def batch_of(part: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids, labels = (torch.stack(column) for column in zip(*part, strict=True))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# Training, as accelerate does it: it shuffles, and repeats examples so that all processes have equally many.
loader = torch.utils.data.DataLoader(examples, batch_size=32, shuffle=True, collate_fn=batch_of)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(4):
    for batch in loader:
        logits = trained(batch["input_ids"], batch["attention_mask"]).logits[:, -1, [4, 5]]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

# The posterior counts every example once, so each process takes its own share.
model = accelerator.unwrap_model(trained)
share = torch.utils.data.Subset(examples, range(accelerator.process_index, len(examples), accelerator.num_processes))
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
laplace = blk.LaplaceLoRA(model, class_token_ids=[4, 5])
laplace.fit(torch.utils.data.DataLoader(share, batch_size=32, collate_fn=batch_of), progress=False, group=group)
laplace.optimize_prior_precision()
accelerator.print(f"{laplace.n_examples} examples, log evidence {float(laplace.log_marginal_likelihood()):.6f}")
if accelerator.is_main_process and len(sys.argv) > 1:  # all of them have the same posterior
    laplace.save_pretrained(sys.argv[1])
accelerator.end_training()
