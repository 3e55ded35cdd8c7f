"""Fine-tunes a small language model with LoRA and asks how sure it is. Runs as it stands, and downloads nothing.

With a model of your own, change `base` and `batches`, as examples/sentiment.py does.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bayesian_lora_kernels as blk

# Stands for your own model and data: which word occurs more often, 2 or 3? The answer is the token 4 or 5.
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=8, initializer_range=0.1, **sizes))
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
answers = [4, 5]
texts = torch.randint(2, 4, (320, 9))
labels = ((texts == 3).sum(1) > 4).long()  # indices into answers
batches = [
    {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}
    for x, y in zip(texts.split(32), labels.split(32), strict=True)
]
batches, held_out = batches[:8], batches[8:]

# Fine-tuning, as ever.
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
for step in range(150):
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
questions = torch.tensor([[2, 2, 2, 2, 2, 2, 2, 2, 2], [2, 3, 2, 3, 2, 3, 2, 3, 2], [6, 7, 0, 6, 7, 0, 6, 7, 1]])
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
