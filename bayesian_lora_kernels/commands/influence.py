"""`blk influence`: what each training example does to the losses of others."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from torch import Tensor

from bayesian_lora_kernels.attribution.scores import influence
from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.dataset import Example, read_examples
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors
from bayesian_lora_kernels.commands.job import load_parts, load_posterior, open_task
from bayesian_lora_kernels.commands.parts import Table


def run(args: Namespace) -> int:
    """Score, print, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    posterior = args.posterior or args.adapter
    folder, task = open_task(args, posterior, texts=True)
    files = (args.data, args.queries)
    parts = [read_examples(path, task.names, True, task.pairs, task.texts) for path in files]
    for path, part in zip(files, parts, strict=True):
        if not part:
            raise InputError(f"{path}: expected at least one example, got none")
    train, queries = load_parts(args, folder, task, parts, posterior)
    laplace = load_posterior(train.inputs.model, posterior)
    if laplace.n_examples != len(parts[0]):
        output.warn(
            f"{args.data}: {len(parts[0])} {task.examples}, but the posterior was fitted to {laplace.n_examples}; "
            "influence is of the examples of the fit"
        )
    with as_input_errors():
        scores = influence(laplace, train.batches(), queries.batches(), damping=args.damping, progress=output.watched())
    result = {
        "command": "influence",
        "adapter": str(args.adapter),
        "base": train.base,
        "posterior": str(posterior),
        "data": str(args.data),
        "queries": str(args.queries),
        "task": task.kind,
        "curvature": laplace.config.curvature,
        "damping": args.damping,
        "train_lines": [example.line for example in parts[0]],
        "query_lines": [example.line for example in parts[1]],
        "scores": scores.tolist(),
    }
    output.write_json(args.json, result)
    about = f"lines of {args.data}, and what each unit of weight that they get changes the loss of a query by"
    output.show(args, about, "", _report(scores, parts[0], parts[1], args.top))
    return 0


def _report(scores: Tensor, train: Sequence[Example], queries: Sequence[Example], top: int) -> Table:
    """The examples that help each query most, and those that harm it."""
    rows = [["query", "helps most", "harms most"]]
    for query, row in zip(queries, scores, strict=True):
        order = row.argsort().tolist()
        helps = [i for i in order[:top] if row[i] < 0]
        harms = [i for i in order[::-1][:top] if row[i] > 0]
        cells = [", ".join(f"{train[i].line} ({float(row[i]):+.3g})" for i in found) for found in (helps, harms)]
        rows.append([str(query.line), *cells])
    return Table(rows, left=3)
