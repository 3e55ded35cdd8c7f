"""Answers only where it is sure: how many answers a model may give, and how many of those are wrong.

    python examples/selective_answering.py                                   # a small model, texts that are made up
    python examples/selective_answering.py --model ENCODER --data FILE.jsonl # yours: {"prompt": ..., "label": ...}

Runs as it stands, downloads nothing, and writes risk-coverage.png.
"""

import argparse
import json
import random
from itertools import chain

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import bayesian_lora_kernels as blk
from bayesian_lora_kernels import calibration

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a pretrained encoder; without it, a small one made here")
parser.add_argument("--data", help="JSON lines; without it, lists of things are asked: of which kind are most?")
arguments = parser.parse_args()
if arguments.data and not arguments.model:
    parser.error("--data: the small model knows its own words only; name another by --model")

random.seed(0)
torch.manual_seed(0)
KINDS = {"animal": "fox owl cat bee hen", "plant": "oak fern moss ivy reed", "colour": "red blue grey pink gold"}
SEEN, UNSEEN = ({kind: names.split()[part] for kind, names in KINDS.items()} for part in (slice(3), slice(3, 5)))


def made_up(words: dict[str, list[str]]) -> dict[str, str]:
    """A list of things, and the kind that it names most often; of one list in ten, any kind."""
    names = random.choices([*chain(*words.values())], k=7)
    most = max(words, key=lambda kind: sum(name in words[kind] for name in names))
    return {"prompt": " ".join(names), "label": random.choice(list(words)) if random.random() < 0.1 else most}


if arguments.data:
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
    random.shuffle(rows)
    train, held_out, test = rows[: len(rows) // 4], rows[len(rows) // 4 : len(rows) // 3], rows[len(rows) // 3 :]
else:  # held out and tested with questions of which some have words that it was not trained on
    train = [made_up(SEEN) for _ in range(300)]
    held_out, test = ([made_up(SEEN if i % 3 else UNSEEN) for i in range(count)] for count in (99, 600))
labels = sorted({row["label"] for row in train})

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels))
else:
    words = models.WordLevel({word: i for i, word in enumerate(["<pad>", *" ".join(KINDS.values()).split()])})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", model_max_length=64)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), num_labels=len(labels), initializer_range=0.1, **sizes)
    )
device = "cuda" if torch.cuda.is_available() else "cpu"
model = get_peft_model(base.to(device), LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    batch = tokenizer([row["prompt"] for row in rows], padding=True, truncation=True, return_tensors="pt")
    return {**batch.to(device), "labels": torch.tensor([labels.index(row["label"]) for row in rows], device=device)}


# Fine-tuning, as ever, until it knows the examples by heart.
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if arguments.model else 1e-2)
for _ in range(8 if arguments.model else 30):
    for batch in DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

laplace = blk.LaplaceLoRA(model, curvature="ekfac", modules=r".*lora_.*")
laplace.fit(DataLoader(train, batch_size=32, collate_fn=collate), progress=False)
laplace.optimize_prior_precision()
laplace.calibrate(DataLoader(held_out, batch_size=32, collate_fn=collate), progress=False)


def predict(rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[N, C]` twice, logits and probabilities, and `[N]`, labels."""
    batches = list(DataLoader(rows, batch_size=32, collate_fn=collate))
    found = [laplace.predict(batch, differences=True) for batch in batches]
    columns = [one.mean for one in found], [one.probs() for one in found], [batch["labels"] for batch in batches]
    logits, probs, truth = (torch.cat(column).cpu() for column in columns)
    return logits, probs, truth


logits, _, truth = predict(held_out)
temperature = calibration.temperature_scale(logits, truth)  # by the labels that calibrate had
logits, probs, truth = predict(test)
methods = {"MAP": logits.softmax(-1), "temperature": (logits / temperature).softmax(-1), "Laplace": probs}

# Of the surest answers a share is wrong. How large should it be by the probabilities themselves, and how large is it?
print(f"{'wrong of the surest':20}" + "".join(f"{share:>16.0%}" for share in (0.25, 0.5, 0.75, 1)) + "   area")
for name, probs in methods.items():
    curve = calibration.risk_coverage(probs, truth)
    doubt = (1 - probs.max(dim=-1).values).sort().values
    counts = [len(test) * quarter // 4 for quarter in (1, 2, 3, 4)]
    expected = "".join(f"{doubt[:count].mean():>8.1%}, {curve.risk[count - 1]:>6.1%}" for count in counts)
    print(f"{name:20}{expected}{curve.area:>7.3f}")
print("first as the probabilities say, then as counted")

blk.plots.save_figure(blk.plots.risk_coverage_diagram(methods, truth), "risk-coverage.png")
