"""A reward model on pairs of answers, and how sure it is. Runs as it stands, and downloads nothing."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

import bayesian_lora_kernels as blk

# Stands for your own model and data, in the columns of a preference data set as TRL collates it. The better answer has
# more of the word 3.
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=8, num_labels=1, pad_token_id=0, initializer_range=0.2, **sizes)
base = LlamaForSequenceClassification(config)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))


def pairs(count: int, words: int = 4) -> dict[str, torch.Tensor]:
    answers = torch.randint(2, words, (2, count, 9))
    better = (answers == 3).sum(2).argsort(0, descending=True)  # [2, count]
    chosen, rejected = answers.gather(0, better[:, :, None].expand_as(answers))
    batch = {"input_ids_chosen": chosen, "input_ids_rejected": rejected}
    masks = {name.replace("ids", "mask").replace("input", "attention"): torch.ones_like(x) for name, x in batch.items()}
    return {**batch, **masks, "labels": torch.zeros(count, dtype=torch.long)}  # the first is the better one


def rewards(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[N, 2]`: of the chosen and of the rejected answer. Their softmax is the model of Bradley and Terry."""
    sides = [
        model(input_ids=batch[f"input_ids_{side}"], attention_mask=batch[f"attention_mask_{side}"]).logits
        for side in ("chosen", "rejected")
    ]
    return torch.cat(sides, dim=1)


batches, held_out = [pairs(32) for _ in range(8)], [pairs(32) for _ in range(2)]
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(100):
    batch = batches[step % len(batches)]
    loss = torch.nn.functional.cross_entropy(rewards(model, batch), batch["labels"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

laplace = blk.LaplaceLoRA(model, forward=rewards, curvature="ekfac")
laplace.fit(batches, progress=False)
laplace.optimize_prior_precision()

for name, batch in (("words as in training", held_out[0]), ("other words", pairs(32, words=8))):
    prediction = laplace.predict(batch, differences=True)  # only the difference of two rewards means anything
    contrast = torch.tensor([1.0, -1.0])
    deviation = torch.einsum("i,nij,j->n", contrast, prediction.covariance, contrast).sqrt()
    print(f"{name}: P(chosen is better) {prediction.probs()[:, 0].mean():.3f}, of the difference of rewards")
    print(f"  the mean is {(prediction.mean @ contrast).mean():.2f}, its standard deviation {deviation.mean():.2f}")
