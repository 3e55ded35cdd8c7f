"""Fine-tunes with `transformers.Trainer`, which ends with a posterior.

    python examples/trainer.py                                   # a small model, texts that are made up
    python examples/trainer.py --model ENCODER --data FILE.jsonl # yours: {"prompt": ..., "label": ...}

Runs as it stands, and downloads nothing.
"""

import argparse
import json
import random
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.integrations.transformers import LaplaceCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a pretrained encoder; without it, a small one made here")
parser.add_argument("--data", help="JSON lines; without it, of which word there are more, cat or dog")
arguments = parser.parse_args()
if arguments.data and not arguments.model:
    parser.error("--data: the small model knows its own words only; name another by --model")

random.seed(0)
torch.manual_seed(0)
if arguments.data:
    with open(arguments.data) as file:
        rows = [json.loads(line) for line in file]
    random.shuffle(rows)
else:
    texts = [" ".join(random.choices(["cat", "dog"], k=9)) for _ in range(320)]
    rows = [{"prompt": text, "label": max("cat", "dog", key=text.split().count)} for text in texts]
labels = sorted({row["label"] for row in rows})
held_out, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels))
else:
    words = models.WordLevel({"<pad>": 0, "cat": 1, "dog": 2})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", model_max_length=64)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=3, initializer_range=0.2, **sizes))
model = get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS"))


def examples(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    return [{**tokenizer(row["prompt"], truncation=True), "labels": labels.index(row["label"])} for row in rows]


with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        num_train_epochs=8,
        learning_rate=2e-3 if arguments.model else 1e-2,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to=[],  # or "wandb", "tensorboard", ...: the numbers of the posterior are there, too
        disable_tqdm=True,
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model, settings, train_dataset=examples(train), eval_dataset=examples(held_out), data_collator=collator
    )
    trainer.add_callback(LaplaceCallback(trainer, curvature="ekfac", calibrate=True, progress=False))
    trainer.train()
    trainer.save_model()

    # The adapter and its posterior lie in one folder.
    laplace = blk.LaplaceLoRA.from_pretrained(model, folder)

questions = [row["prompt"] for row in held_out[:4]]
probs = laplace.predict({**tokenizer(questions, padding=True, truncation=True, return_tensors="pt")}).probs()
for question, row in zip(questions, probs.tolist(), strict=True):
    print(", ".join(f"{label} {p:.3f}" for label, p in zip(labels, row, strict=True)), "|", question)
