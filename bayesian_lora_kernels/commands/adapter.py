"""A PEFT adapter folder: its base model, its tokenizer, and the two put together."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import InputError, absence, brief, loading

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
TASKS = {CAUSAL_LM: "a causal language model", SEQ_CLS: "a classifier or reward model"}
NO_LIMIT = 10**9  # tokenizers that know no maximal length say 10^30


@dataclass(frozen=True)
class AdapterFolder:
    """Where an adapter is and what it belongs to; nothing is loaded yet.

    Attributes:
        folder: of the adapter.
        base: folder or hub name of the base model.
        task: PEFT's name of what it is for, one of `TASKS`.
        download: whether the base may be downloaded: only if the user named it on the command line.
        revision: of the base on the hub, as the adapter remembers it.
    """

    folder: Path
    base: str
    task: str
    download: bool
    revision: str | None

    def tokenizer(self) -> Any:
        """The adapter's own tokenizer if it has one, else the base's.

        Raises:
            InputError: if there is none, or it cannot be loaded.
        """
        from transformers import AutoTokenizer

        own = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        source = str(self.folder) if own else self.base
        with loading(f"tokenizer of {source}"):
            if own:
                return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            try:
                return AutoTokenizer.from_pretrained(source, **self._hub())
            except OSError as error:
                raise self._absent("tokenizer", error) from error

    def base_config(self) -> Any:
        """The base model's configuration.

        Raises:
            InputError: if it cannot be loaded.
        """
        from transformers import AutoConfig

        with loading(f"base model {self.base}"):
            try:
                return AutoConfig.from_pretrained(self.base, **self._hub())
            except OSError as error:
                raise self._absent("base model", error) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the adapter's weights.

        Raises:
            InputError: if they cannot be read.
        """
        with loading(f"adapter {self.folder}"), safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def model(self, device: torch.device, dtype: str, config: Any = None) -> nn.Module:
        """The base model with the adapter, trainable, in eval mode.

        Args:
            device: a quantised model stays where its quantiser put it.
            dtype: of the base; `auto` is the one it was saved in.
            config: of a base that classifies texts; None: it is a causal language model.

        Raises:
            InputError: if one of them cannot be loaded, or the adapter does not fit the base.
        """
        import peft
        import transformers

        key = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        kind: Any = transformers.AutoModelForCausalLM
        options = {key: wanted, **self._hub()}
        if config is not None:  # the head is the adapter's, whatever the base has
            kind = transformers.AutoModelForSequenceClassification
            options |= {"config": config, "ignore_mismatched_sizes": True}
        with loading(f"base model {self.base}"), loading_bar(output.watched()), _quiet(config is not None):
            try:
                base, info = kind.from_pretrained(self.base, output_loading_info=True, **options)
            except OSError as error:
                raise self._absent("base model", error) from error
            if getattr(base, "hf_quantizer", None) is None:
                base = base.to(device)
        with loading(f"adapter {self.folder}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error, below
            try:
                model = peft.PeftModel.from_pretrained(
                    base, str(self.folder), is_trainable=True, torch_device=str(device)
                )
            except RuntimeError as error:  # shapes that differ
                raise InputError(f"the adapter does not fit the base model {self.base}: {brief(error)}") from error
            random = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
            self._check_fit(model, () if config is None else random)
        return model.eval()

    def _check_fit(self, model: Any, random: Iterable[str]) -> None:
        """PEFT only warns of weights that the file lacks, and ignores those that the model has no place for.

        Args:
            model: with the adapter.
            random: names of weights of the base that it lacks: those have random numbers if the adapter has none.
        """
        from peft import get_peft_model_state_dict
        from peft.utils import load_peft_weights

        expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        stored = set(load_peft_weights(str(self.folder), device="cpu"))
        lacking = sorted(expected - stored)
        homeless = sorted(name for name in stored - expected if "lora_" in name)
        nowhere = sorted(name for name in random if f"base_model.model.{name}" not in stored)
        if nowhere:
            raise InputError(
                f"{len(nowhere)} weights of the classifier, such as {nowhere[0]}, are neither in the base model "
                f"{self.base} nor in the adapter, which must have been trained with others than it would now get; pass "
                "--base FOLDER of the base model with them, or train with their module in modules_to_save"
            )
        if lacking:
            found = f"{len(lacking)} weights are missing from it, such as {lacking[0]}"
        elif homeless:
            found = f"{len(homeless)} of its weights have no place there, such as {homeless[0]}"
        else:
            return
        raise InputError(f"the adapter does not fit the base model {self.base}: {found}")

    def _hub(self) -> dict[str, Any]:
        options: dict[str, Any] = {"local_files_only": not self.download, "trust_remote_code": False}
        if self.revision and not Path(self.base).is_dir():
            options["revision"] = self.revision
        return options

    def _absent(self, what: str, error: Exception) -> InputError:
        if Path(self.base).is_dir():
            return InputError(f"{what} {self.base}: cannot be loaded: {brief(error)}")
        if self.download:
            return InputError(f"{what} {self.base}: no such folder, and not to be had from the hub: {brief(error)}")
        return InputError(
            f"{what} {self.base}, which {self.folder / CONFIG} names, is not on this machine; pass --base FOLDER, or "
            f"--base {self.base} to download it"
        )


def open_adapter(
    folder: Path, base: str | None, tasks: Sequence[str] = (CAUSAL_LM,), weights: bool = True
) -> AdapterFolder:
    """Read an adapter folder's configuration.

    Args:
        folder: that `save_pretrained` of PEFT wrote.
        base: folder or hub name of the base model; None: what the adapter says.
        tasks: what it may be for.
        weights: whether it must have its weights.

    Raises:
        InputError: if it is for something else, or does not say what its base is.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise InputError(f"{folder}: {absence(folder)}; expected a PEFT adapter folder")
    if not path.is_file():
        raise InputError(f"{folder}: no {CONFIG} in it; expected a PEFT adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    if weights and not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise InputError(
                f"{folder / PICKLED}: a pickle, which can run code when it is read, so it is not read; where you trust "
                f"it, load it with PEFT and write it again: model.save_pretrained(folder) makes {WEIGHTS}"
            )
        raise InputError(f"{folder}: no adapter weights in it; expected {WEIGHTS}")
    task = config.get("task_type") or CAUSAL_LM
    if task not in tasks:
        expected = " or ".join(TASKS[one] for one in tasks)
        raise InputError(f"{folder}: expected an adapter of {expected}, this one is for {task}")
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise InputError(f"{path}: it does not name the base model; pass --base FOLDER")
    if not Path(named).is_dir() and (_is_path(named) or Path(named).exists()):
        if base is not None:
            raise InputError(f"--base {base}: {absence(Path(base))}; expected the folder of a base model")
        raise InputError(f"{path}: its base model {named} is not there; pass --base FOLDER")
    adapter = AdapterFolder(folder, str(named), task, base is not None, None if base else config.get("revision"))
    _check_config(path, config, adapter.shapes() if weights else None)
    return adapter


def _check_config(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    """Whether PEFT can be given this: it would import what the file names, and allocate what it asks for.

    Without weights, of which `shapes` are, nothing is allocated.

    Raises:
        InputError: if not.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type: expected LORA, got {kind!r:.80}")
    for key in ("megatron_config", "layer_replication"):
        if config.get(key):
            raise InputError(f"{path}: {key}: expected none, which is all that blk serves")
    known = {} if shapes is None else shapes
    largest = max((shape[0] for name, shape in known.items() if "lora_" in name and "_A" in name and shape), default=0)
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: rank_pattern: expected an object, got {pattern!r:.80}")
    for rank in (config.get("r", 8), *pattern.values()):
        if not isinstance(rank, int) or (shapes is not None and rank > largest):
            most = "" if shapes is None else f" of at most {largest}, as the weights have"
            raise InputError(f"{path}: expected ranks{most}, got {rank!r:.80}")


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one.

    Raises:
        InputError: for a name that is no device, or one that this machine lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # which a device without numbers refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise InputError(f"--device {name}: not usable on this machine; expected such as {there}") from error
    return device


def context_length(tokenizer: Any, model_config: Any) -> int | None:
    """The longest prompt, in tokens, that tokenizer and model are made for; None if neither says."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(model_config, "max_position_embeddings", None)]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < NO_LIMIT]
    return min(known, default=None)


def pad_token(tokenizer: Any, model_config: Any) -> int:
    """What fills up a batch: the tokenizer's pad token if the model has it; else any, as the mask hides it."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) and pad < getattr(model_config, "vocab_size", 0) else 0


def _is_path(name: str) -> bool:
    """Whether a name cannot be one on the hub, which is `name` or `owner/name`."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name


@contextmanager
def loading_bar(shown: bool) -> Iterator[None]:
    """Transformers shows its progress even in a log file."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Transformers warns of a new classification head, which the adapter then replaces."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
