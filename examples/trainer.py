"""Fine-tunes with `transformers.Trainer`, which ends with a posterior. Runs as it stands, and downloads nothing."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.integrations.transformers import LaplaceCallback

# Stands for your own model and data: which word occurs more often, 2 or 3?
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
base = BertForSequenceClassification(BertConfig(vocab_size=8, initializer_range=0.2, **sizes))
model = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
texts = torch.randint(2, 4, (320, 9))
examples = [{"input_ids": text, "labels": int((text == 3).sum() > 4)} for text in texts]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=8,
        learning_rate=0.01,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to=[],  # or "wandb", "tensorboard", ...: the numbers of the posterior are there, too
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples[:256], eval_dataset=examples[256:])
    trainer.add_callback(LaplaceCallback(trainer, curvature="ekfac", calibrate=True, progress=False))
    trainer.train()
    trainer.save_model()

    # The adapter and its posterior lie in one folder.
    laplace = blk.LaplaceLoRA.from_pretrained(model, folder)

questions = {"input_ids": torch.tensor([[2, 2, 2, 2, 2, 2, 2, 2, 2], [2, 3, 2, 3, 2, 3, 2, 3, 2]])}
print("probabilities", laplace.predict(questions).probs())
