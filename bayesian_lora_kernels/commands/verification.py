"""`blk doctor --adapter`: what this package forms from the user's own model, against autograd and the model itself."""

from __future__ import annotations

from argparse import Namespace

from bayesian_lora_kernels.commands.adapter import choose_device, context_length, open_adapter, pad_token
from bayesian_lora_kernels.commands.dataset import batches, read_examples
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors
from bayesian_lora_kernels.commands.job import check_vocabulary
from bayesian_lora_kernels.commands.tokens import choice_tokens, tokenise_prompts
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.verification import Verification

EXAMPLES = 8  # of the file; the one with most padding among them and its neighbour are compared


def verify_adapter(args: Namespace) -> Verification:
    """Load the adapter, and verify it on the first prompts of the file.

    Raises:
        InputError: for whatever the user has to put right.
    """
    if args.data is None:
        raise InputError("--data: expected a file of JSON lines with prompts, to verify the adapter on")
    folder = open_adapter(args.adapter, args.model)
    examples = read_examples(args.data, None, labelled=False)[:EXAMPLES]
    device = choose_device(args.device)
    tokenizer = folder.tokenizer()
    ids = choice_tokens(tokenizer, args.choices) if args.choices else None
    model = folder.model(device, args.dtype)
    config = getattr(model, "config", None)
    prompts, _ = tokenise_prompts(tokenizer, examples, context_length(tokenizer, config))
    check_vocabulary(model, prompts)
    with as_input_errors():
        laplace = LaplaceLoRA(model, class_token_ids=ids)
        return laplace.verify(batches(prompts, EXAMPLES, pad_token(tokenizer, config))[0])
