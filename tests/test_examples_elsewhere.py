"""Layers that do not see [N, ...] with the batch's examples in their order: right all the same, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from situations import (
    CURVATURES,
    Scene,
    adapted,
    dense_covariance,
    deviations,
    floats,
    judge_scene,
    labelled,
    ours,
    padded,
    plain_module,
    tensors,
    truth,
)
from torch import Tensor, nn

WORDS = ("example", "batch of one")


class Body(nn.Module):
    """Two layers on 5 columns, and what the subclasses do with the examples in between."""

    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, classes)


class Plain(Body):
    def forward(self, x: Tensor) -> Tensor:  # [N, T, 5], as in all that follow
        return self.second(torch.tanh(self.first(x)).mean(dim=1))


class Pairs(Body):
    """Chosen and rejected, one long batch."""

    def __init__(self, interleaved: bool = False):
        super().__init__(classes=1)
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 5]
        rows = x.flatten(0, 1) if self.interleaved else torch.cat([x[:, 0], x[:, 1]])
        scores = self.second(torch.tanh(self.first(rows)))
        return scores.view(-1, 2) if self.interleaved else torch.cat(scores.chunk(2), dim=1)


class PairsOfTexts(Body):
    """The same on [N, 2, T, 5]: rows are [2N, T, 5]."""

    def __init__(self, interleaved: bool = False):
        super().__init__(classes=1)
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        rows = x.flatten(0, 1) if self.interleaved else x.transpose(0, 1).flatten(0, 1)
        scores = self.second(torch.tanh(self.first(rows)).mean(dim=1))
        return scores.view(n, 2) if self.interleaved else scores.view(2, n).T


class TimeFirst(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.transpose(0, 1))).mean(dim=0))


class TimeFirstAll(Body):
    """The head runs with time first too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.transpose(0, 1)))).mean(dim=0)


class TimeFirstIfOdd(Body):
    """A layout that changes from one batch to the next."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 == 0:
            return self.second(torch.tanh(self.first(x)).mean(dim=1))
        return self.second(torch.tanh(self.first(x.transpose(0, 1))).mean(dim=0))


class PytorchEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.second = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), nn.Linear(6, 3)
        for name, p in self.named_parameters():
            p.requires_grad_("linear" in name or "second" in name)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.layer(x.transpose(0, 1)).mean(dim=0))


class Recurrent(nn.Module):
    """A frozen nn.GRU, time first, and a layer on its outputs [T, N, d]."""

    def __init__(self):
        super().__init__()
        self.gru, self.mix, self.second = nn.GRU(5, 4).requires_grad_(False), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x.transpose(0, 1))
        return self.second(torch.tanh(self.mix(states))[-1])


class Table(nn.Module):
    """A table of positions that all examples share; it may have N rows by coincidence, or 2 N."""

    def __init__(self, rows: int, ndim: int = 2):
        super().__init__()
        self.position, self.second = nn.Linear(2, 5), nn.Linear(5, 3)
        self.register_buffer("grid", floats(*([1] * (ndim - 2)), rows, 2))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.tanh(self.position(self.grid)).reshape(-1, 5)
        return self.second((x * table[: x.shape[1]]).mean(dim=1))


class Latents(nn.Module):
    """Queries that all examples share, expanded to [N, L, d] before they are mapped: right today."""

    def __init__(self, expanded: bool):
        super().__init__()
        self.query, self.key, self.second = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 3)
        self.register_buffer("latents", floats(4, 5))
        self.expanded = expanded

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1) if self.expanded else self.latents
        weights = torch.softmax(self.query(latents) @ self.key(x).mT, dim=-1)
        return self.second((weights @ x).mean(dim=1))


class Hyper(nn.Module):
    """A layer that makes another one's weights from a code that knows of no example."""

    def __init__(self):
        super().__init__()
        self.make, self.second = nn.Linear(3, 20), nn.Linear(4, 3)
        self.register_buffer("code", floats(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(self.code).view(4, 5)
        return self.second(torch.tanh(nn.functional.linear(x, weight)).mean(dim=1))


class Experts(nn.Module):
    """Tokens go to the expert that a frozen router chooses."""

    def __init__(self, top: int = 1, by: str = "token"):
        super().__init__()
        self.router = nn.Linear(5, 3, bias=False).requires_grad_(False)
        self.experts, self.second = nn.ModuleList(nn.Linear(5, 4) for _ in range(3)), nn.Linear(4, 3)
        self.top, self.by = top, by

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        flat = x.reshape(-1, d)
        choice = flat[:, :1].long() if self.by == "column" else self.router(flat).topk(self.top, dim=1).indices
        hidden = x.new_zeros(n * t, 4)
        for e, expert in enumerate(self.experts):
            rows = (choice == e).any(dim=1).nonzero()[:, 0]
            if len(rows):
                hidden = hidden.index_add(0, rows, torch.tanh(expert(flat[rows])))
        return self.second(hidden.view(n, t, -1).mean(dim=1))


class Capacity(nn.Module):
    """Experts with a capacity: expert e gets one token of every example, but sorted by how much it wants them."""

    def __init__(self):
        super().__init__()
        self.experts, self.second = nn.ModuleList(nn.Linear(5, 4) for _ in range(2)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = 0
        for e, expert in enumerate(self.experts):
            chosen = x[:, e]
            order = chosen[:, 0].argsort()
            hidden = hidden + torch.tanh(expert(chosen[order]))[order.argsort()]
        return self.second(hidden)


class SortedByLength(Body):
    """Longest first, as pack_padded_sequence wants it; rows of zeros are padding."""

    def forward(self, x: Tensor) -> Tensor:
        length = (x.abs().sum(dim=2) > 0).sum(dim=1)
        order = length.argsort(descending=True, stable=True)
        hidden = torch.tanh(self.first(x[order]))
        hidden = hidden * (x[order].abs().sum(dim=2, keepdim=True) > 0)
        return self.second(hidden.sum(dim=1) / length[order][:, None])[order.argsort()]


class Packed(Body):
    """A layer on the data of a PackedSequence: rows go by time, then by example."""

    def forward(self, x: Tensor) -> Tensor:
        length = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x, length, batch_first=True)
        hidden = torch.nn.utils.rnn.PackedSequence(torch.tanh(self.first(packed.data)), packed.batch_sizes)
        return self.second(nn.utils.rnn.pad_packed_sequence(hidden, batch_first=True)[0].mean(dim=1))


class Mixer(nn.Module):
    """A layer along time, on x.transpose(1, 2): [N, d, T] keeps the examples first and is right today."""

    def __init__(self, t: int, across: bool = False):
        super().__init__()
        self.mix, self.second, self.across = nn.Linear(t, t), nn.Linear(5, 3), across

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x.permute(2, 0, 1)).permute(1, 2, 0) if self.across else self.mix(x.mT).mT
        return self.second(torch.tanh(mixed).mean(dim=1))


class Flattened(Body):
    def __init__(self, time_first: bool):
        super().__init__()
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        if self.time_first:
            return self.second(torch.tanh(self.first(x.transpose(0, 1).reshape(-1, d))).view(t, n, -1).mean(dim=0))
        return self.second(torch.tanh(self.first(x.reshape(-1, d))).view(n, t, -1).mean(dim=1))


class Reordered(Body):
    """Examples are taken in another order and brought back."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        order = {
            "rolled": torch.arange(n).roll(1),
            "flipped": torch.arange(n).flip(0),
            "halves": torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)]),
        }[self.how]
        hidden = torch.tanh(self.first(x[order]))[order.argsort()]
        return self.second(hidden.mean(dim=1))


class Beams(Body):
    """Every example in several copies, one after the other or as a whole."""

    def __init__(self, tiled: bool):
        super().__init__()
        self.tiled = tiled
        self.register_buffer("shift", floats(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, k = len(x), len(self.shift)
        if self.tiled:
            rows = x.repeat(k, 1, 1) + self.shift.repeat_interleave(n, dim=0)
            return self.second(torch.tanh(self.first(rows)).mean(dim=1)).view(k, n, -1).mean(dim=0)
        rows = x.repeat_interleave(k, dim=0) + self.shift.repeat(n, 1, 1)
        return self.second(torch.tanh(self.first(rows)).mean(dim=1)).view(n, k, -1).mean(dim=1)


class Axial(nn.Module):
    """Attention along one axis of [N, H, W, d]: the other is folded into the batch."""

    def __init__(self, folded_first: bool):
        super().__init__()
        self.value, self.second, self.folded_first = nn.Linear(5, 4), nn.Linear(4, 3), folded_first

    def forward(self, x: Tensor) -> Tensor:  # [N, H, W, 5]
        n, h, w, d = x.shape
        if self.folded_first:
            rows = self.value(x.permute(2, 0, 1, 3).reshape(w * n, h, d))
            hidden = rows.cumsum(dim=1).view(w, n, h, -1).permute(1, 2, 0, 3)
        else:
            hidden = self.value(x.permute(0, 2, 1, 3).reshape(n * w, h, d)).cumsum(dim=1).view(n, w, h, -1)
        return self.second(torch.tanh(hidden).mean(dim=(1, 2)))


class Nested(Body):
    """One example at a time, in a loop; the last one first."""

    def __init__(self, backwards: bool):
        super().__init__()
        self.backwards = backwards

    def forward(self, x: Tensor) -> Tensor:
        rows = list(x)[::-1] if self.backwards else list(x)
        found = [self.second(torch.tanh(self.first(row)).mean(dim=0)) for row in rows]
        return torch.stack(found[::-1] if self.backwards else found)


class Interacting(Body):
    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).mean(dim=1)
        if self.how == "mean":
            hidden = hidden - hidden.mean(dim=0)
        elif self.how == "max":
            hidden = hidden / hidden.abs().amax(dim=0)
        elif self.how == "neighbour":
            hidden = hidden + 0.3 * hidden.roll(1, dims=0)
        elif self.how == "attention":
            hidden = torch.softmax(hidden @ hidden.T, dim=1) @ hidden
        elif self.how == "detached":  # values of the others, but no gradient to them
            hidden = hidden - hidden.mean(dim=0).detach()
        return self.second(hidden)


class BatchStatistics(Body):
    """BatchNorm that goes on using the batch's statistics in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(x)).mean(dim=1)))


class Towers(nn.Module):
    """Logits of every text against every image of the batch, [N, N]."""

    def __init__(self):
        super().__init__()
        self.text, self.image = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 5]
        return self.text(x[:, 0]) @ self.image(x[:, 1]).T


class Chunks(Body):
    """A chunked feed-forward, time in pieces: several calls of one layer, right today."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([torch.tanh(self.first(part)) for part in x.split(2, dim=1)], dim=1)
        return self.second(hidden.mean(dim=1))


class BatchChunks(Body):
    """Examples in pieces: several calls of one layer, each with some of the examples."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([torch.tanh(self.first(part)) for part in x.split(self.size)])
        return self.second(hidden.mean(dim=1))


class Deduplicated(Body):
    """Equal examples are run once."""

    def forward(self, x: Tensor) -> Tensor:
        unique, back = torch.unique(x.flatten(1), dim=0, return_inverse=True)
        return self.second(torch.tanh(self.first(unique.view(-1, *x.shape[1:]))).mean(dim=1)[back])


class EmptyRows(Body):
    """Examples that pass a gate; the others take another path that is not trained."""

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0, 0] > 0).nonzero()[:, 0]
        hidden = x.mean(dim=1)[:, :4].clone()
        if len(rows):
            hidden = hidden.index_copy(0, rows, torch.tanh(self.first(x[rows])).mean(dim=1))
        return self.second(hidden)


def duplicated(n: int, t: int) -> list[tuple[Tensor, Tensor]]:
    x = floats(n, t, 5)
    x[1] = x[0]
    return [(x, torch.arange(n) % 3)]


def routed(*experts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Four examples of three tokens; the first column says which expert a token goes to."""
    x = floats(4, 3, 5)
    x[:, :, 0] = torch.tensor([e for rows in experts for e in rows]).view(4, 3)
    return [(x, torch.arange(4) % 3)]


def ragged(*lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for b, batch in enumerate(lengths):
        x = floats(len(batch), max(batch), 5, seed=5 + b)
        for i, n in enumerate(batch):
            x[i, n:] = 0
        batches.append((x, torch.arange(len(batch)) % 3))
    return batches


def of(build: Callable[[], nn.Module], *shapes: tuple[int, ...], batches: Any = None, **scene: Any) -> Any:
    def make() -> Scene:
        model = plain_module(build)
        data = batches() if batches else tensors(*shapes, classes=2 if shapes[0][1] == 2 else 3)  # pairs
        return Scene(model, data, **{"words": WORDS, **scene})

    return make


N4T4, N4T3, N3T6, N6T3 = (4, 4, 5), (4, 3, 5), (3, 6, 5), (6, 3, 5)


def bert_choice(three: bool = True, choices: int = 3) -> Scene:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    model = adapted(
        transformers.BertForMultipleChoice(config), ["query", "value"], modules_to_save=["classifier"], scale=0.5
    )
    ids = torch.randint(3, 40, (4, choices, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % choices}
    if three:
        batch["token_type_ids"] = (torch.arange(5) > 2).long().expand_as(ids).contiguous()
    return Scene(model, [batch], words=(*WORDS, "choice"))


def deberta(version: int, targets: list[str]) -> Scene:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        num_labels=3,
        initializer_range=0.3,
        position_biased_input=False,
    )
    if version == 2:
        config = transformers.DebertaV2Config(
            **settings, position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm"
        )
        model = transformers.DebertaV2ForSequenceClassification(config)
    else:
        model = transformers.DebertaForSequenceClassification(transformers.DebertaConfig(**settings))
    batch = labelled(padded([6, 4, 5, 6], 50))
    # Padding is inside the table's reach only: the table does not depend on the mask.
    return Scene(adapted(model, targets, task_type="SEQ_CLS"), [batch], words=WORDS, factors=False)


def xlnet(n: int, t: int) -> Scene:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8, num_labels=3, initializer_range=0.3
    )
    model = adapted(transformers.XLNetForSequenceClassification(config), ["layer_1", "layer_2"])
    return Scene(model, [labelled(padded([t] * n, 40))], words=WORDS)


def image_batches(n: int, size: int) -> list[dict[str, Tensor]]:
    return [{"pixel_values": floats(n, 3, size, size), "labels": torch.arange(n) % 3}]


def swin(v2: bool) -> Scene:
    """Windows are folded into the batch; Swin v2 also maps a table of positions that all windows share."""
    torch.manual_seed(0)
    settings = dict(
        image_size=8,
        patch_size=1,
        embed_dim=4,
        depths=[1],
        num_heads=[1],
        window_size=4,
        num_labels=3,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    if v2:
        model = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**settings))
        targets: Any = r".*continuous_position_bias_mlp\.0"
    else:
        model, targets = (
            transformers.SwinForImageClassification(transformers.SwinConfig(**settings)),
            ["query", "value"],
        )
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if isinstance(targets, str):
        targets = [n for n in linear if "bias_mlp" in n][:1]
    else:
        targets = [n for n in linear if "attention" in n][:3]
    assert targets, linear
    return Scene(adapted(model, targets), image_batches(3, 8), words=WORDS, tolerance=1e-5)


def timesformer() -> Scene:
    """Time attention sees [N * patches, frames, d], space attention [N * frames, patches, d]."""
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        image_size=4,
        patch_size=2,
        num_frames=3,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        initializer_range=0.3,
    )
    model = adapted(transformers.TimesformerForVideoClassification(config), ["qkv"])
    batch = {"pixel_values": floats(3, 3, 3, 4, 4), "labels": torch.arange(3)}
    return Scene(model, [batch], words=WORDS)


def conformer() -> Scene:
    """linear_pos maps a table of relative positions, [1, 2 T - 1, d]."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=[4],
        conv_kernel=[4],
        conv_stride=[4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        position_embeddings_type="relative",
        classifier_proj_size=8,
        initializer_range=0.3,
        hidden_dropout=0.0,
        conformer_conv_dropout=0.0,
        feat_extract_norm="layer",
        vocab_size=20,
        conv_depthwise_kernel_size=3,
    )
    model = transformers.Wav2Vec2ConformerForSequenceClassification(config)
    model = adapted(model, ["linear_pos", "linear_q"])
    return Scene(model, [{"input_values": floats(3, 32), "labels": torch.arange(3)}], words=WORDS)


def mixtral() -> Scene:
    """A Mixtral-like block of experts from a ModuleList, inside PEFT."""
    model = plain_module(Experts).float()
    lora = adapted(model, r"experts\.\d|second", scale=0.5)
    return Scene(lora, tensors(N4T3, (2, 5, 5)), words=WORDS)


def clip() -> Scene:
    torch.manual_seed(0)
    text = dict(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 4,
            "patch_size": 2,
        },
        projection_dim=6,
    )
    model = adapted(transformers.CLIPModel(config), ["text_projection", "visual_projection"])
    ids = torch.randint(3, 38, (3, 5))
    ids[:, -1] = 39
    batch = {"input_ids": ids, "pixel_values": floats(3, 3, 4, 4), "labels": torch.arange(3)}
    run = lambda m, b: m(input_ids=b["input_ids"], pixel_values=b["pixel_values"]).logits_per_text  # noqa: E731
    return Scene(model, [batch], run=run, arguments={"forward": run}, words=WORDS, served=False)


SCENES: dict[str, Callable[[], Scene]] = {
    # Models that keep every assumption: the check itself.
    "plain": of(Plain, N4T3, (2, 5, 5), words=()),
    "plain, N = T": of(Plain, N4T4, words=()),
    "several calls, time in pieces": of(Chunks, N4T3, N4T4, words=()),
    "along time": of(lambda: Mixer(3), N4T3, words=()),
    "flattened": of(lambda: Flattened(False), N4T3, N4T4, words=()),
    "pairs, interleaved": of(lambda: Pairs(True), (6, 2, 5), words=()),
    "latents, expanded": of(lambda: Latents(True), N4T3, words=()),
    # Pairs and copies.
    "pairs": of(Pairs, (6, 2, 5), (3, 2, 5)),
    "pairs, one example": of(Pairs, (1, 2, 5), (1, 2, 5)),
    "pairs of texts": of(PairsOfTexts, (4, 2, 3, 5)),
    "pairs of texts, interleaved": of(lambda: PairsOfTexts(True), (4, 2, 3, 5)),
    "beams": of(lambda: Beams(False), N4T3),
    "beams, tiled": of(lambda: Beams(True), N4T3),
    # Time first.
    "time first, N = T": of(TimeFirst, N4T4),
    "time first": of(TimeFirst, N4T3),
    "time first, one example": of(TimeFirst, (1, 3, 5), (1, 4, 5)),
    "time first, one example and one token": of(TimeFirst, (1, 1, 5), (1, 4, 5)),
    "time first, N twice T": of(TimeFirst, N6T3),
    "time first, T twice N": of(TimeFirst, N3T6),
    "time first with the head, N = T": of(TimeFirstAll, N4T4),
    "time first if odd": of(TimeFirstIfOdd, (5, 4, 5), (5, 5, 5)),
    "time first if odd, N = 3": of(TimeFirstIfOdd, (3, 4, 5), (3, 3, 5), (2, 3, 5)),
    "PyTorch's encoder, N = T": of(PytorchEncoder, (4, 4, 6)),
    "PyTorch's encoder": of(PytorchEncoder, (4, 3, 6)),
    "after a GRU, N = T": of(Recurrent, N4T4),
    "after a GRU": of(Recurrent, N4T3),
    "flattened, time first": of(lambda: Flattened(True), N4T3),
    "flattened, time first, N = T": of(lambda: Flattened(True), N4T4),
    "along time, columns first": of(lambda: Mixer(3, across=True), N4T3),
    "along time, as many columns as examples": of(lambda: Mixer(3, across=True), (5, 3, 5)),
    # Tables.
    "table": of(lambda: Table(3), N4T3),
    "table of N rows": of(lambda: Table(4), N4T3),
    "table of 2 N rows": of(lambda: Table(8), N4T3),
    "table with a leading one": of(lambda: Table(8, ndim=3), N4T3),
    "table, one example": of(lambda: Table(3), (1, 3, 5), (1, 2, 5)),
    "latents, shared": of(lambda: Latents(False), (5, 3, 5)),
    "latents, N of them": of(lambda: Latents(False), N4T3),
    "a weight made by a layer": of(Hyper, N4T3, factors=False),
    # Tokens elsewhere.
    "experts": of(Experts, N4T3, (2, 5, 5)),
    "experts, N rows by coincidence": of(
        lambda: Experts(by="column"), batches=lambda: routed([0] * 4, [1] * 4, [2] * 4)
    ),
    "experts, N k rows by coincidence": of(
        lambda: Experts(by="column"), batches=lambda: routed([0] * 8, [1] * 4), words=("never called",)
    ),
    "experts, two of three": of(lambda: Experts(top=2), N4T3),
    "experts, all of three": of(lambda: Experts(top=3), N4T3),
    "experts in PEFT": mixtral,
    "experts with a capacity": of(Capacity, N4T3),
    "a gate for examples": of(EmptyRows, (5, 3, 5), (4, 2, 5)),
    # Examples in another order.
    "sorted by length": of(SortedByLength, batches=lambda: ragged([4, 3, 2], [2, 4, 3])),
    "sorted by length, shortest first": of(SortedByLength, batches=lambda: ragged([2, 3, 4])),
    "packed": of(Packed, N4T3),
    "packed, N = T": of(Packed, N4T4),
    "rolled": of(lambda: Reordered("rolled"), N4T3),
    "flipped": of(lambda: Reordered("flipped"), N4T3),
    "halves": of(lambda: Reordered("halves"), N4T3, N6T3),
    "examples in pieces": of(lambda: BatchChunks(2), N4T3),
    "examples in pieces of one": of(lambda: BatchChunks(1), N4T3),
    "a loop over examples": of(lambda: Nested(False), N3T6),
    "a loop over examples, N = T": of(lambda: Nested(False), N4T4),
    "a loop from the last example, N = T": of(lambda: Nested(True), N4T4),
    "equal examples once": of(Deduplicated, batches=lambda: duplicated(4, 3)),
    "equal examples once, none equal": of(Deduplicated, N4T3),
    # Axes that are folded into the batch.
    "axial": of(lambda: Axial(False), (3, 2, 4, 5)),
    "axial, folded first": of(lambda: Axial(True), (3, 2, 4, 5)),
    # transformers
    "multiple choice": bert_choice,
    "multiple choice, ids alone": lambda: bert_choice(three=False),
    "multiple choice, as many choices as examples": lambda: bert_choice(choices=4),
    "DeBERTa-v2": lambda: deberta(2, ["query_proj", "value_proj"]),
    "DeBERTa-v2, keys": lambda: deberta(2, ["key_proj"]),
    "DeBERTa": lambda: deberta(1, ["pos_proj", "pos_q_proj"]),
    "XLNet": lambda: xlnet(3, 4),
    "XLNet, N = T": lambda: xlnet(4, 4),
    "Swin": lambda: swin(False),
    "Swin v2, table": lambda: swin(True),
    "TimeSformer": timesformer,
    "conformer": conformer,
    # The others' values, but no gradient to them: autograd's numbers for an example of this batch are defined.
    "detached batch mean": of(
        lambda: Interacting("detached"),
        N4T3,
        single=lambda batch, i: (batch[0], i),
        run=lambda model, row: model(row[0])[row[1]][None],
        factors=False,
    ),
    # Examples that interact: nothing is right.
    "batch mean": of(lambda: Interacting("mean"), N4T3, served=False),
    "batch maximum": of(lambda: Interacting("max"), N4T3, served=False),
    "neighbour": of(lambda: Interacting("neighbour"), N4T3, served=False),
    "attention between examples": of(lambda: Interacting("attention"), N4T3, served=False),
    "batch statistics": of(BatchStatistics, N4T3, served=False),
    "two towers": of(Towers, (4, 2, 5), served=False),
    "CLIP": clip,
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", SCENES)
def test_right_or_refused(name: str, curvature: str):
    judge_scene(SCENES[name](), curvature)


def test_examples_that_interact_on_the_second_batch_only():
    class Late(Body):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x)).mean(dim=1)
            return self.second(hidden - hidden.mean(dim=0) if x.shape[1] == 2 else hidden)

    scene = of(Late, N4T3, (4, 2, 5), served=False)()
    judge_scene(scene, "ekfac")


# The harness: it passes what is right, and sees what is wrong.


def test_the_truth_is_seen_to_be_off():
    for curvature in CURVATURES:
        scene = of(Plain, N4T3, (2, 5, 5), words=())()
        found = ours(scene, curvature)
        assert max(deviations(scene, found, curvature).values()) < 1e-9
        with torch.no_grad():
            scene.model.first.weight[0, 0] += 0.5
        found.laplace._weights = None  # which would notice
        off = deviations(scene, found, curvature)
        assert any(what.startswith("covariance") and error > 1e-3 for what, error in off.items())
        assert curvature == "exact" or any(w[:5] in ("trace", "A of ", "S of ") and e > 1e-3 for w, e in off.items())


def test_the_truth_of_examples_in_another_order_is_their_own():
    scene = of(Pairs, (4, 2, 5))()
    examples = [x for batch in truth(scene) for x in batch]
    identity = {name: _Identity(examples[0].jacobian[name][0].numel()) for name in examples[0].jacobian}
    covariance = dense_covariance(identity, [x.jacobian for x in examples])
    x = scene.batches[0][0]
    for i in range(4):  # by hand: scores of the two rows
        rows = []
        for row in x[i]:
            score = scene.model.second(torch.tanh(scene.model.first(row)))
            grads = torch.autograd.grad(score.sum(), list(scene.model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        j = torch.stack(rows)
        torch.testing.assert_close(covariance[i], j @ j.T)


class _Identity:
    def __init__(self, size: int):
        self.size = size

    def to_dense(self) -> Tensor:
        return torch.eye(self.size, dtype=torch.float64)
