"""Which examples should be labelled next? Mutual information against random choice, with the curve as a picture.

    python examples/active_learning.py                                   # a small model, texts that are made up
    python examples/active_learning.py --model ENCODER --data FILE.jsonl # yours: {"prompt": ..., "label": ...}

Runs as it stands, downloads nothing, and writes active-learning.png.
"""

import argparse
import copy
import json
import random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import bayesian_lora_kernels as blk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a pretrained encoder; without it, a small one made here")
parser.add_argument("--data", help="JSON lines; without it, made-up remarks, of which some kinds are rare in the pool")
parser.add_argument("--seeds", type=int, default=6, help="runs of either way, each from labels of its own (default: 6)")
arguments = parser.parse_args()
if arguments.data and not arguments.model:
    parser.error("--data: the small model knows its own words only; name another by --model")

COUNTS = range(16, 64, 12)  # labels: where to begin, and how many more each time
TOPICS = (("good", "bad"), ("cheap", "dear"), ("prompt", "late"))
OTHER = ["the", "shop", "box", "was", "very", "we", "it", "again"]


def made_up(rare: float) -> dict[str, str]:
    """A customer praises or blames; this share of them the price or the delivery in place of the thing."""
    topic, label = random.choice((1, 2)) if random.random() < rare else 0, random.randrange(2)
    words = random.choices(OTHER, k=8)
    words[5] = TOPICS[topic][label]
    return {"prompt": " ".join(words), "label": ("positive", "negative")[label]}


random.seed(0)
torch.manual_seed(0)
if arguments.data:
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
    random.shuffle(rows)
    pool, test = rows[:400], rows[400:800]
else:  # what is rare in the pool counts in the test
    pool, test = [made_up(rare=0.1) for _ in range(400)], [made_up(rare=0.67) for _ in range(400)]
labels = sorted({row["label"] for row in pool})

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels))
else:
    words = models.WordLevel({word: i for i, word in enumerate(["<pad>", *OTHER, *sum(TOPICS, ())])})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", model_max_length=64)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes))
device = "cuda" if torch.cuda.is_available() else "cpu"


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    batch = tokenizer([row["prompt"] for row in rows], padding=True, truncation=True, return_tensors="pt")
    return {**batch.to(device), "labels": torch.tensor([labels.index(row["label"]) for row in rows], device=device)}


def fine_tune(rows: list[dict[str, str]], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base).to(device), lora)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if arguments.model else 1.5e-2)
    for _ in range(30):
        for batch in (collate(rows[start : start + 64]) for start in range(0, len(rows), 64)):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def mutual_information(model: torch.nn.Module, labelled: list[dict[str, str]]) -> torch.Tensor:
    """`[N]`, between the label of each text of the pool and the weights: what its label would say of them."""
    laplace = blk.LaplaceLoRA(model, curvature="exact", modules=r".*lora.*").fit([collate(labelled)], progress=False)
    laplace.optimize_prior_precision()
    found = []
    for start in range(0, len(pool), 100):
        prediction = laplace.predict(collate(pool[start : start + 100]), differences=True)
        probs = prediction.sample(128, generator=torch.Generator(device).manual_seed(0)).softmax(dim=-1)
        entropy = torch.special.entr(probs).sum(dim=-1).mean(dim=0)
        found.append(torch.special.entr(probs.mean(dim=0)).sum(dim=-1) - entropy)
    return torch.cat(found).cpu()


def accuracy(model: torch.nn.Module) -> float:
    batch = collate(test)
    with torch.no_grad():
        return float((model(**batch).logits.argmax(dim=-1) == batch["labels"]).float().mean())


def learn(informed: bool, seed: int) -> list[float]:
    """The accuracy at each number of labels; both ways begin with the same."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    chosen, curve = order[: COUNTS[0]].tolist(), []
    for _ in COUNTS:
        labelled = [pool[i] for i in chosen]
        model = fine_tune(labelled, seed)
        curve.append(accuracy(model))
        ranking = mutual_information(model, labelled).argsort(descending=True) if informed else order
        chosen += [i for i in ranking.tolist() if i not in chosen][: COUNTS.step]
    return curve


curves = {}
print(f"{'accuracy with':20}" + "".join(f"{f'{count} labels':>16}" for count in COUNTS))
for name, informed in (("random choice", False), ("mutual information", True)):
    curve = torch.tensor([learn(informed, seed) for seed in range(arguments.seeds)])
    curves[name] = mean, error = curve.mean(dim=0), curve.std(dim=0) / arguments.seeds**0.5
    print(f"{name:20}" + "".join(f"{f'{m:.3f} ± {e:.3f}':>16}" for m, e in zip(mean, error, strict=True)))
print(f"mean and standard error of {arguments.seeds} runs; the curve is in active-learning.png")

figure = blk.plots.curve_diagram(
    COUNTS,
    {name: mean for name, (mean, _) in curves.items()},
    errors={name: error for name, (_, error) in curves.items()},
    x_label="labels",
    y_label="accuracy on the test set",
)
blk.plots.save_figure(figure, "active-learning.png")
