"""`blk score`: how sure the model is of each token of a text, printed and drawn."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import choose_device, context_length, open_adapter
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors, reading, writing
from bayesian_lora_kernels.commands.highlight import ScoredToken, draw, html
from bayesian_lora_kernels.commands.inputs import check_vocabulary
from bayesian_lora_kernels.commands.job import check_fitted
from bayesian_lora_kernels.commands.parts import Table
from bayesian_lora_kernels.commands.tokens import Text, tokenise_text
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.posterior.storage import write_text


def run(args: Namespace) -> int:
    """Score, print, draw, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = open_adapter(args.adapter, args.base)
    posterior = args.posterior or args.adapter
    check_fitted(posterior)
    with reading(args.text, "a text file"):
        content = args.text.read_text(encoding="utf-8-sig")
    device = choose_device(args.device)
    tokenizer = folder.tokenizer()
    text = tokenise_text(tokenizer, content, str(args.text))
    model: Any = folder.model(device, args.dtype)
    check_vocabulary(model, [text.prefix + text.ids])
    limit = min(args.window, context_length(tokenizer, getattr(model, "config", None)) or args.window)
    with as_input_errors():
        laplace = LaplaceLoRA.from_pretrained(model, posterior)
        tokens = _score(laplace, text, limit, args.samples, args.seed, device)
    scored = [token for token in tokens if token.log_prob is not None]
    if not scored:
        raise InputError(f"{args.text}: it is a single token, before which there is nothing to predict it from")
    if args.html is not None:
        with writing(args.html, "--html"):
            write_text(args.html, html(tokens, f"{args.text.name}, {args.adapter.name}"))
    if args.plot is not None:
        with writing(args.plot, "--plot"):
            draw(tokens, args.plot)
    means = {name: sum(getattr(token, name) for token in scored) / len(scored) for name in _MEASURES}
    result = {
        "command": "score",
        "adapter": str(args.adapter),
        "base": folder.base,
        "posterior": str(posterior),
        "text": str(args.text),
        "n_tokens": len(tokens),
        "n_samples": args.samples,
        "window": limit,
        "seed": args.seed,
        "means": means,
        "tokens": [token._asdict() for token in tokens],
    }
    output.write_json(args.json, result)
    drawn = [f"text with colours written to {path}" for path in (args.html, args.plot) if path is not None]
    about = f"{len(tokens)} tokens of {args.text}, {len(scored)} of them scored; in nats"
    output.show(args, about, "", _report(tokens, means), *drawn)
    return 0


_MEASURES = {
    "log_prob_map": "log p, MAP",
    "log_prob": "log p, Laplace",
    "entropy": "entropy",
    "mutual_information": "mutual information",
}


def _score(
    laplace: LaplaceLoRA, text: Text, limit: int, samples: int, seed: int, device: torch.device
) -> list[ScoredToken]:
    """Every window with the same samples of the weights; a token counts where most of what precedes it is seen."""
    room = limit - len(text.prefix)
    if room < 2:
        raise InputError(f"--window: expected more than {len(text.prefix) + 1}, got {limit}")
    values: list[tuple[float | None, ...]] = [(None,) * len(_MEASURES)] * len(text.ids)
    starts = [0, *range(room - room // 2, max(len(text.ids) - room // 2, 1), room - room // 2)]
    done = 0
    for start in output.bar(starts, desc="score", unit="window"):
        stop = min(start + room, len(text.ids))
        ids = torch.tensor([text.prefix + text.ids[start:stop]])
        if ids.shape[1] > 1:
            generator = torch.Generator(device).manual_seed(seed)
            scores = laplace.score({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, samples, generator)
            columns = [getattr(scores, name)[0].tolist() for name in _MEASURES]
            for i in range(done, stop):
                at = len(text.prefix) + i - start
                if at:
                    values[i] = tuple(column[at] for column in columns)
        done = stop
    return [ScoredToken(i, p, *v) for i, p, v in zip(text.ids, text.pieces, values, strict=True)]


def _report(tokens: list[ScoredToken], means: dict[str, float]) -> Table:
    rows = [["token", *_MEASURES.values()]]
    for token in tokens:
        numbers = (getattr(token, name) for name in _MEASURES)
        rows.append([repr(token.text), *("-" if x is None else f"{x:.3f}" for x in numbers)])
    rows.append(["mean", *(f"{means[name]:.3f}" for name in _MEASURES)])
    return Table(rows)
