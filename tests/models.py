"""Small random models with adapters, and the examples that go with them: what the tests measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 13
PAD = 0


@dataclass
class Case:
    """A model, its data, and the truth about one example: its logits when it runs alone, without padding."""

    model: nn.Module
    examples: list[Tensor]
    labels: Tensor
    logits: Callable[[nn.Module, Tensor], Tensor]  # (model, one example) -> [C]
    arguments: dict[str, Any] = field(default_factory=dict)  # of LaplaceLoRA
    collate: Callable[..., Any] | None = None  # (examples, labels) -> batch

    def batch(self, which: Sequence[int] | None = None, **padding: Any) -> Any:
        """The examples `which` (all, if None) as one batch with labels."""
        index = list(range(len(self.examples)) if which is None else which)
        examples, labels = [self.examples[i] for i in index], self.labels[index]
        return (self.collate or pad)(examples, labels, **padding)

    def loader(self, size: int, **padding: Any) -> list[Any]:
        n = len(self.examples)
        return [self.batch(range(i, min(i + size, n)), **padding) for i in range(0, n, size)]

    def evaluated(self) -> nn.Module:
        """A copy in eval mode and without checkpointing, for the truth."""
        model = copy.deepcopy(self.model).eval()
        for module in model.modules():
            if isinstance(module, Mlp):
                module.checkpointed = False
        return model


def pad(examples: Sequence[Tensor], labels: Tensor, side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """Token ids of different lengths as one padded batch."""
    width = max(len(ids) for ids in examples) + extra
    input_ids = torch.full((len(examples), width), PAD)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, ids in enumerate(examples):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, place], mask[row, place] = ids, 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def texts(
    lengths: Sequence[int], classes: int, seed: int = 0, vocabulary: int = VOCABULARY
) -> tuple[list[Tensor], Tensor]:
    """Random token ids of the given lengths, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]
    return ids, torch.randint(0, classes, (len(ids),), generator=generator)


def lora(model: nn.Module, targets: Sequence[str], r: int = 3, scale: float = 0.5, **config: Any) -> Any:
    """The model with a LoRA adapter of which no part is zero; `scale` is that of its B."""
    config.setdefault("lora_alpha", 2 * r)
    modules = targets if isinstance(targets, str) else list(targets)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=modules, **config))
    return randomise(adapted, scale)


def randomise(model: nn.Module, scale: float = 0.5, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise)
    return model


class RmsNorm(nn.Module):
    """As in transformers, which computes it in float32 whatever the model's dtype."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)


def in_float64(model: Any) -> Any:
    """The model in float64, and nothing in it in less: otherwise nothing could be compared to 1e-10."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith(("LlamaRMSNorm", "T5LayerNorm")):
                setattr(module, name, RmsNorm(child.weight, child.variance_epsilon))
    return model.double()


def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None]).logits[0, -1]


def llama(
    lengths: Sequence[int] = (5, 3, 6, 4),
    classes: Sequence[int] | None = (2, 5, 7),
    targets: Sequence[str] = ("q_proj", "v_proj"),
    hidden: int = 16,
    layers: int = 2,
    vocabulary: int = VOCABULARY,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
    **adapter: Any,
) -> Case:
    """Causal LM whose last token chooses between some tokens (None: all of the vocabulary)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=spread,
        pad_token_id=PAD,
    )
    model = lora(transformers.LlamaForCausalLM(config), targets, task_type="CAUSAL_LM", **adapter).to(dtype)
    if dtype == torch.float64:
        in_float64(model)
    return causal_case(model, lengths, classes, vocabulary)


def gpt2(lengths: Sequence[int] = (5, 3, 6, 4), targets: Sequence[str] = ("c_attn", "c_proj")) -> Case:
    """Absolute positions, and base layers that are Conv1D."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    )
    base = transformers.GPT2LMHeadModel(config)
    model = lora(base, targets, task_type="CAUSAL_LM", fan_in_fan_out=True).double()
    return causal_case(model, lengths, (1, 4), VOCABULARY)


def causal_case(model: nn.Module, lengths: Sequence[int], classes: Sequence[int] | None, vocabulary: int) -> Case:
    examples, labels = texts(lengths, len(classes) if classes else vocabulary, vocabulary=vocabulary)
    chosen = torch.tensor(classes if classes else range(vocabulary))
    arguments: dict[str, Any] = {"class_token_ids": list(classes)} if classes else {"fisher": "exact"}
    return Case(model, examples, labels, lambda m, ids: last_logits(m, ids)[chosen], arguments)


def bert(lengths: Sequence[int] = (5, 3, 6, 4), classes: int = 3, **adapter: Any) -> Case:
    """Encoder with a trainable classification head (`modules_to_save`)."""
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=classes,
        initializer_range=0.3,
    )
    base = transformers.BertForSequenceClassification(config)
    model = lora(base, ("query", "value", "dense"), r=2, task_type="SEQ_CLS", **adapter).double()
    examples, labels = texts(lengths, max(classes, 2))
    return Case(model, examples, labels, lambda m, ids: m(input_ids=ids[None]).logits[0])


class PooledT5(nn.Module):
    """T5's encoder, the mean over valid tokens, and a head."""

    def __init__(self, classes: int):
        super().__init__()
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0
        )
        self.encoder = transformers.T5EncoderModel(config)
        self.score = nn.Linear(16, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = valid.to(hidden.dtype) / valid.sum(dim=1, keepdim=True)
        return SimpleNamespace(logits=self.score((hidden * weights[:, :, None]).sum(dim=1)))


def t5(lengths: Sequence[int] = (5, 3, 6, 4), classes: int = 3) -> Case:
    torch.manual_seed(3)
    model = in_float64(lora(PooledT5(classes), ("q", "v", "wo"), modules_to_save=["score"]))
    examples, labels = texts(lengths, classes)
    return Case(model, examples, labels, lambda m, ids: m(input_ids=ids[None]).logits[0])


def seq2seq(lengths: Sequence[int] = (5, 6), extra: int = 1, decoder_mask: bool = True) -> Case:
    """Encoder and decoder; an example is the source followed by the target, of 3 tokens at most."""
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    model = in_float64(lora(transformers.T5ForConditionalGeneration(config), ("q", "v"), task_type="SEQ_2_SEQ_LM"))
    examples, labels = texts(lengths, 2)
    targets = [3, 2] if decoder_mask else [3, 3]

    def parts(which: Tensor) -> tuple[Tensor, Tensor]:
        target = targets[next(i for i, x in enumerate(examples) if x is which)]
        return which[:-target], which[-target:]

    def collate(which: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        source = pad([parts(x)[0] for x in which], labels, extra=extra)
        target = pad([parts(x)[1] for x in which], labels)
        batch = {**source, "decoder_input_ids": target["input_ids"]}
        return {**batch, "decoder_attention_mask": target["attention_mask"]} if decoder_mask else batch

    def logits(model: nn.Module, example: Tensor) -> Tensor:
        source, target = parts(example)
        return model(input_ids=source[None], decoder_input_ids=target[None]).logits[0, -1, [2, 3]]

    return Case(model, examples, labels, logits, {"class_token_ids": [2, 3]}, collate)


class Mlp(nn.Module):
    """Everything that makes capturing hard: a module that is called twice, in-place activations, checkpoints."""

    def __init__(self, width: int = 6, inputs: int = 4, classes: int = 3, checkpointed: bool = False):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.twice = nn.Linear(width, width)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(width, classes)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.first(x))
        hidden = torch.tanh(self.twice(hidden))
        return hidden + torch.tanh(self.twice(hidden))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        if hidden.ndim == 3:  # tokens
            hidden = hidden.mean(dim=1)
        return self.last(hidden)


def mlp(
    n: int = 5,
    classes: int = 3,
    tokens: int | None = None,
    width: int = 6,
    inputs: int = 4,
    checkpointed: bool = False,
    dtype: torch.dtype = torch.float64,
    trainable: Sequence[str] | None = None,
) -> Case:
    """A plain module on batches `(inputs, labels)`; `trainable`: parameter names, None for all of them."""
    torch.manual_seed(4)
    model = Mlp(width, inputs, classes, checkpointed).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable is None or name in trainable)
    shape = (inputs,) if tokens is None else (tokens, inputs)
    examples = list(torch.randn(n, *shape, dtype=dtype))
    if classes == 1:
        labels = torch.randn(n, 1, dtype=dtype)
        arguments: dict[str, Any] = {"likelihood": "regression"}
    else:
        labels, arguments = torch.randint(0, classes, (n,)), {}
    return Case(
        model,
        examples,
        labels,
        lambda m, x: m(x[None])[0],
        arguments,
        collate=lambda xs, ys: (torch.stack(list(xs)), ys),
    )
