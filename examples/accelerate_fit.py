"""One posterior from several processes, each with a share of the data.

    torchrun --nproc_per_node 2 examples/accelerate_fit.py            # a small model, texts that are made up
    torchrun --nproc_per_node 2 examples/accelerate_fit.py --model NAME --data FILE.jsonl --save FOLDER

Runs as it stands, on CPUs too, and downloads nothing; `accelerate launch --num_processes 2 ...` does the same.
The file has {"prompt": ..., "label": ...}, labels as they follow the prompt.
"""

import argparse
import json
import random

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bayesian_lora_kernels as blk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a pretrained language model; without it, a small one made here")
parser.add_argument("--data", help="JSON lines; without it, of which word there are more, cat or dog")
parser.add_argument("--save", help="folder for the adapter and its posterior")
arguments = parser.parse_args()
if arguments.data and not arguments.model:
    parser.error("--data: the small model knows its own words only; name another by --model")
accelerator = Accelerator(cpu=not torch.cuda.is_available())

# The same on every process.
random.seed(0)
torch.manual_seed(0)
if arguments.data:
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
else:
    texts = [" ".join(random.choices([" cat", " dog"], k=9)) for _ in range(320)]
    rows = [{"prompt": text, "label": max(" cat", " dog", key=text.count)} for text in texts]
if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
else:
    words = models.WordLevel({"<pad>": 0, "cat": 1, "dog": 2})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", model_max_length=64, padding_side="left"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=8, initializer_range=0.1, **sizes))
model = get_peft_model(base, LoraConfig(r=8, task_type="CAUSAL_LM"))
labels = sorted({row["label"] for row in rows})
answers = [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]  # their first tokens


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    batch = tokenizer([row["prompt"] for row in rows], padding=True, truncation=True, return_tensors="pt")
    columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {**columns, "labels": torch.tensor([labels.index(row["label"]) for row in rows])}


# Training, as accelerate does it: it shuffles, and repeats examples so that all processes have equally many.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if arguments.model else 2e-2)
loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)
trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(4):
    for batch in loader:
        logits = trained(batch["input_ids"], batch["attention_mask"]).logits[:, -1, answers]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

# The posterior counts every example once, so each process takes its own share.
model = accelerator.unwrap_model(trained)
share = Subset(rows, range(accelerator.process_index, len(rows), accelerator.num_processes))
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
laplace = blk.LaplaceLoRA(model, class_token_ids=answers)
laplace.fit(DataLoader(share, batch_size=16, collate_fn=collate), progress=False, group=group)
laplace.optimize_prior_precision()
accelerator.print(f"{laplace.n_examples} examples, log evidence {float(laplace.log_marginal_likelihood()):.6f}")
if accelerator.is_main_process and arguments.save:  # all of them have the same posterior
    model.save_pretrained(arguments.save)
    laplace.save_pretrained(arguments.save)
accelerator.end_training()
