"""A reward model on pairs of answers, and how sure it is which of two is better.

    python examples/reward_model.py                                 # a small model, pairs that are made up
    python examples/reward_model.py --model NAME --data FILE.jsonl  # yours: {"chosen": ..., "rejected": ...}

Runs as it stands, and downloads nothing.
"""

import argparse
import json
import random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import bayesian_lora_kernels as blk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a pretrained language model; without it, a small one made here")
parser.add_argument("--data", help="JSON lines; without it, made-up pairs: better is what is more polite")
arguments = parser.parse_args()
if arguments.data and not arguments.model:
    parser.error("--data: the small model knows its own words only; name another by --model")

random.seed(0)
torch.manual_seed(0)
POLITE, OTHER, UNSEEN = ("please", "thanks"), ("go", "now", "bring", "tea"), ("kindly", "gladly", "hey", "pronto")


def made_up(words: tuple[str, ...]) -> dict[str, str]:
    answers = [" ".join(random.choices(words, k=8)) for _ in range(2)]
    worse, better = sorted(answers, key=lambda text: sum(word in POLITE for word in text.split()))
    return {"chosen": better, "rejected": worse}


if arguments.data:
    with open(arguments.data) as file:
        pairs = [json.loads(line) for line in file]
else:
    pairs = [made_up(POLITE + OTHER) for _ in range(320)]
random.shuffle(pairs)
held_out, train = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
else:
    words = models.WordLevel({word: i for i, word in enumerate(["<pad>", *POLITE, *OTHER, *UNSEEN])})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", model_max_length=64)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, initializer_range=0.2, **sizes)
    )
device = "cuda" if torch.cuda.is_available() else "cpu"
model = get_peft_model(base.to(device), LoraConfig(r=8, task_type="SEQ_CLS"))


def collate(pairs: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    batch = {}
    for side in ("chosen", "rejected"):
        texts = tokenizer([pair[side] for pair in pairs], padding=True, truncation=True, return_tensors="pt").to(device)
        batch |= {f"{name}_{side}": texts[name] for name in ("input_ids", "attention_mask")}
    return batch


# Fine-tuning, as ever.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if arguments.model else 1e-2)
for _ in range(3 if arguments.model else 12):
    for batch in DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate):
        chosen = model(batch["input_ids_chosen"], batch["attention_mask_chosen"]).logits
        rejected = model(batch["input_ids_rejected"], batch["attention_mask_rejected"]).logits
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="ekfac")
laplace.fit(DataLoader(train, batch_size=32, collate_fn=collate), progress=False)
laplace.optimize_prior_precision()

questions = {"held out": held_out[:32], "words that it was not trained on": [made_up(UNSEEN) for _ in range(32)]}
for name, pairs in questions.items():
    prediction = laplace.predict(collate(pairs))  # of two rewards only the difference means anything
    mean, variance = prediction.difference()
    print(f"{name}: P(chosen is better) {prediction.probs()[:, 0].mean():.3f}; the difference of the rewards")
    print(f"  is {mean.mean():.2f}, with a standard deviation of {variance.sqrt().mean():.2f}")
