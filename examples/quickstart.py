"""Fine-tunes a small language model with LoRA and asks how sure it is.

    python examples/quickstart.py                # a small model made here
    python examples/quickstart.py --model NAME   # a pretrained one, by its name or folder

Runs as it stands, and downloads nothing.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import bayesian_lora_kernels as blk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a causal language model; without it, a small one made here")
name = parser.parse_args().model

# Of which word are there more, cat or dog? The answer is one of the two.
torch.manual_seed(0)
if name:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    words = " cat", " dog", " bird", " fish"
    cat, dog, bird, fish = (tokenizer.encode(word, add_special_tokens=False)[0] for word in words)
else:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=8, initializer_range=0.1, **sizes))
    cat, dog, bird, fish = 4, 5, 6, 7
device = "cuda" if torch.cuda.is_available() else "cpu"
model = get_peft_model(base.to(device), LoraConfig(r=8, task_type="CAUSAL_LM"))
answers = [cat, dog]
texts = torch.tensor(answers, device=device)[torch.randint(2, (320, 9), device=device)]
labels = ((texts == dog).sum(1) > 4).long()  # indices into answers
batches = [
    {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}
    for x, y in zip(texts.split(32), labels.split(32), strict=True)
]
batches, held_out = batches[:8], batches[8:]

# Fine-tuning, as ever.
optimizer = torch.optim.AdamW(model.parameters(), lr=0.002 if name else 0.02)
for step in range(40 if name else 150):
    batch = batches[step % len(batches)]
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, -1, answers]
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# The posterior over the adapter's weights.
laplace = blk.LaplaceLoRA(model, class_token_ids=answers, curvature="ekfac")
laplace.fit(batches, progress=False)
laplace.optimize_prior_precision()  # by the marginal likelihood
laplace.calibrate(held_out, progress=False)  # the level of the probabilities, by labels that it was not trained on

# A clear case, a close one, and words that were in no example.
questions = torch.tensor([[cat] * 9, [cat, dog] * 4 + [dog], [bird, fish] * 4 + [bird]], device=device)
batch = {"input_ids": questions, "attention_mask": torch.ones_like(questions)}
prediction = laplace.predict(batch)
print("plain     ", prediction.probs("map"))
print("calibrated", prediction.probs())
print("variance of the logits", prediction.variance)

# Saved beside the adapter's own files, and loaded again.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    laplace.save_pretrained(folder)
    again = blk.LaplaceLoRA.from_pretrained(model, folder)
assert torch.equal(again.predict(batch).probs(), prediction.probs())
