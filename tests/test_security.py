"""No code comes out of files: what the package must not use, and what it refuses (docs/security.md)."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import made as made  # the fixture

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.commands.adapter import open_adapter
from bayesian_lora_kernels.commands.errors import InputError

PACKAGE = Path(blk.__file__).parent
# Calls that run, or import, what a file or a text says.
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "joblib.load", "dill.load",
    "cloudpickle.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "os.popen", "torch.jit.load",
    "torch.hub.load", "torch.package.PackageImporter",
}  # fmt: skip


def violations(source: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & (FORBIDDEN | {"torch.load"}))
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN:
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        for key in ("allow_pickle", "trust_remote_code", "shell"):
            if keywords.get(key) == "True":
                found.append(f"{key}=True")
        if "Auto" in name and name.endswith(".from_pretrained") and not {None, "trust_remote_code"} & set(keywords):
            found.append(f"{name} without trust_remote_code")
    return found


def sources() -> Iterator[Path]:
    yield from PACKAGE.rglob("*.py")


def test_nothing_in_the_package_runs_what_a_file_says() -> None:
    assert {str(path): found for path in sources() if (found := violations(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)", "from pickle import load", "torch.load(path)", "torch.load(path, weights_only=False)",
        "from torch import load", "numpy.load(path, allow_pickle=True)", "eval(text)", "run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "AutoConfig.from_pretrained(name)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert violations(line)
    assert not violations("torch.load(path, weights_only=True)\nmodel.eval()\nyaml.safe_load(text)")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def copied(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (made / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_pickles_are_not_read(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(InputError, match=r"adapter_model.bin: a pickle, .*is not read; .*save_pretrained"):
        open_adapter(folder, str(made / "base"))
    (folder / "adapter_model.safetensors").write_bytes((made / "adapter/adapter_model.safetensors").read_bytes())
    adapter = open_adapter(folder, str(made / "base"))
    assert adapter.model(torch.device("cpu"), "auto") is not None
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("what", ["tokenizer", "base_config", "model"])
def test_code_beside_a_model_is_not_run(what: str, made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (made / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Evil: pass\n")
    names = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    for name, extra in (
        ("config.json", {"model_type": "evil"}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}),
    ):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, **extra, "auto_map": names}))
    adapter = open_adapter(copied(made, tmp_path), str(base))
    call = {
        "tokenizer": adapter.tokenizer,
        "base_config": adapter.base_config,
        "model": lambda: adapter.model(torch.device("cpu"), "auto"),
    }[what]
    with pytest.raises(InputError, match=r"custom code|trust_remote_code|evil"):
        call()
    assert not (tmp_path / "exploded").exists()


CONFIGS = {
    "ranks": ({"r": 10**9}, r"expected ranks of at most 3, as the weights have, got 1000000000"),
    "a rank of one module": ({"rank_pattern": {"q_proj": 10**9}}, r"expected ranks of at most 3"),
    "another kind": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "peft_type: expected LORA"),
    "a module to import": ({"megatron_config": {}, "megatron_core": "evil"}, None),
    "a module, imported": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config: expected none"),
    "copies": ({"layer_replication": [[0, 10**9]]}, "layer_replication: expected none"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_gets_no_more_than_its_weights_take(name: str, made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    change, message = CONFIGS[name]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        open_adapter(folder, str(made / "base"))
        return
    with pytest.raises(InputError, match=message):
        open_adapter(folder, str(made / "base"))
