"""Posteriors on disk: what is read is what was written, and nothing damaged is ever read."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from models import Case, bert, llama, mlp
from torch import nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.posterior import storage

CASES = {
    "kfac": (llama, {}),
    "kfac, shared inputs": (lambda: llama(targets=("q_proj", "k_proj", "v_proj")), {}),
    "kfac, adapted head": (lambda: llama(targets=("v_proj", "lm_head")), {}),
    "kfac, low-rank": (lambda: mlp(n=9, width=24, inputs=20), {"rank": 3, "rank_threshold": 8}),
    "ekfac": (bert, {"curvature": "ekfac"}),
    "exact": (llama, {"curvature": "exact"}),
    "exact, bf16": (llama, {"curvature": "exact", "row_dtype": torch.bfloat16}),
    "float32": (lambda: mlp(dtype=torch.float32), {}),
    "regression": (lambda: mlp(classes=1), {}),
}


def fitted(case: Case, **arguments) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **case.arguments, **arguments).fit(case.loader(2), progress=False)


@pytest.mark.parametrize("prior", ["shared", "per module"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, prior, tmp_path):
    build, arguments = CASES[name]
    case = build()
    laplace = fitted(case, **arguments)
    laplace.optimize_prior_precision(per_module=prior == "per module")
    laplace.save_pretrained(tmp_path / "new" / "folder")
    again = blk.LaplaceLoRA.from_pretrained(build().model, tmp_path / "new" / "folder")
    assert again.config.as_json() == laplace.config.as_json()
    assert (again.n_examples, again.log_likelihood) == (laplace.n_examples, laplace.log_likelihood)
    assert again.likelihood == laplace.likelihood
    assert again.prior_precision == laplace.prior_precision
    assert isinstance(again.prior_precision, dict) == (prior == "per module")
    assert float(again.log_marginal_likelihood()) == pytest.approx(float(laplace.log_marginal_likelihood()), rel=1e-12)
    one, other = laplace.predict(case.batch()), again.predict(case.batch())
    assert torch.equal(one.mean, other.mean)
    assert torch.allclose(one.covariance, other.covariance, rtol=1e-12, atol=0)
    drawn = [x.sample_weights(2, torch.Generator().manual_seed(3)) for x in (laplace, again)]
    for parameter, value in drawn[0].items():
        assert torch.allclose(drawn[1][parameter], value, rtol=1e-9, atol=1e-12), parameter
    if laplace.config.curvature != "exact":
        for module, factors in laplace.factors.items():
            for key in ("a", "s", "tail_a", "tail_s"):
                assert torch.equal(getattr(again.factors[module], key), getattr(factors, key))
    again.optimize_prior_precision().fit(case.loader(2), progress=False)  # it can go on


def test_shared_factors_are_written_once_and_shared_again(tmp_path):
    build, arguments = CASES["kfac, shared inputs"]
    fitted(build(), **arguments).save_pretrained(tmp_path)
    factors = blk.LaplaceLoRA.from_pretrained(build().model, tmp_path).factors
    first = [f.a for name, f in factors.items() if "layers.0" in name and "lora_A" in name]
    assert len(first) == 3
    assert first[0] is first[1] is first[2]


def test_rows_in_files_are_saved_like_others(tmp_path):
    case = mlp(n=6)
    spilled, held = fitted(case, curvature="exact", memory_budget=1), fitted(case, curvature="exact")
    spilled.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    assert torch.allclose(again.predict(case.batch()).covariance, held.predict(case.batch()).covariance, rtol=1e-12)


def test_it_lies_beside_the_adapter_and_leaves_its_files_alone(tmp_path):
    case = llama()
    case.model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    laplace = fitted(case)
    laplace.save_pretrained(tmp_path)
    laplace.prior_precision = 3.0
    laplace.save_pretrained(tmp_path)  # again, in place of the first
    names = {path.name for path in tmp_path.iterdir()}
    new = names - set(before)
    assert len(new) == 2
    assert "laplace.json" in new
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask for name in new)
    assert float(blk.LaplaceLoRA.from_pretrained(case.model, tmp_path).prior_precision) == 3.0


def test_its_own_forward_must_be_given_again(tmp_path):
    case = mlp()
    laplace = blk.LaplaceLoRA(case.model, forward=lambda m, batch: 2 * m(batch[0])).fit([case.batch()], False)
    laplace.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fitted with its own forward; pass the same forward="):
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path, forward=lambda m, batch: 2 * m(batch[0]))
    assert torch.equal(again.predict(case.batch()).mean, laplace.predict(case.batch()).mean)


def test_layers_are_those_of_the_fit_even_if_names_end_alike(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.inner = nn.Linear(3, 3), nn.ModuleDict({"fc": nn.Linear(3, 2)})

        def forward(self, x):
            return self.inner["fc"](torch.tanh(self.fc(x)))

    model, x = Nested().double(), torch.randn(4, 3, dtype=torch.float64)
    batch = (x, torch.tensor([0, 1, 1, 0]))
    laplace = blk.LaplaceLoRA(model, modules="fc").fit([batch], progress=False)
    assert list(laplace.posterior) == ["fc"]
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(model, tmp_path)
    assert list(again.posterior) == ["fc"]
    assert torch.equal(again.predict(batch).covariance, laplace.predict(batch).covariance)


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    case = mlp()
    laplace = fitted(case)
    laplace.save_pretrained(tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    return case, laplace, tmp_path / "laplace.json", tensors


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def edit(change):
    def damage(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def newer(content):
    content["version"] = storage.VERSION + 1


DAMAGE = {
    "tensors truncated": ("tensors", truncate, ValueError, r"safetensors: damaged or altered.*checksum"),
    "tensors altered": ("tensors", flip_a_bit, ValueError, r"safetensors: damaged or altered.*checksum"),
    "tensors empty": ("tensors", lambda p: p.write_bytes(b""), ValueError, r"safetensors: damaged or altered"),
    "tensors missing": ("tensors", lambda p: p.unlink(), FileNotFoundError, r"safetensors: missing, laplace.json"),
    "JSON truncated": ("json", truncate, ValueError, r"laplace.json: damaged, not JSON"),
    "JSON not text": ("json", lambda p: p.write_bytes(b"\xff\xfe{}"), ValueError, r"laplace.json: damaged, not JSON"),
    "JSON missing": ("json", lambda p: p.unlink(), FileNotFoundError, r"laplace.json: no posterior here"),
    "JSON of another kind": ("json", lambda p: p.write_text("[]"), ValueError, r"laplace.json: expected a posterior"),
    "a number altered": (
        "json",
        edit(lambda c: c.update(n_examples=7)),
        ValueError,
        r"laplace.json: damaged or altered",
    ),
    "a setting altered": (
        "json",
        edit(lambda c: c["settings"].update(tokens="last")),
        ValueError,
        r"laplace.json: damaged or altered",
    ),
    "a key removed": ("json", edit(lambda c: c.pop("settings")), ValueError, r"laplace.json: damaged or altered"),
    "a newer version": ("json", edit(newer), ValueError, r"format version 5, this package reads up to version 4"),
    "no version": ("json", edit(lambda c: c.pop("version")), ValueError, r"format version None"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name, saved):
    case, laplace, json_file, tensors = saved
    which, damage, error, message = DAMAGE[name]
    damage(json_file if which == "json" else tensors)
    with pytest.raises(error, match=message):
        blk.LaplaceLoRA.from_pretrained(case.model, json_file.parent)
    laplace.save_pretrained(json_file.parent)  # and can be put right
    blk.LaplaceLoRA.from_pretrained(case.model, json_file.parent)


def train_further(model):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-9


OTHERS = {
    "other weights": (lambda: mlp(), train_further, r"adapter's weights are not those the posterior was fitted to"),
    "a dtype that does not hold them": (lambda: mlp(), lambda m: m.bfloat16(), r"adapter's weights are not those"),
    "another width": (lambda: mlp(width=7), None, r"expected first of shape \[6, 5\], this model's has \[7, 5\]"),
    "another model": (llama, None, r"has 3 modules, of which this model lacks 3, such as first"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(name, saved):
    build, change, message = OTHERS[name]
    model = build().model
    if change:
        change(model)
    with pytest.raises(ValueError, match=message):
        blk.LaplaceLoRA.from_pretrained(model, saved[2].parent)


def test_what_is_frozen_there_and_in_which_dtype_does_not_matter(saved):
    case, laplace, json_file, _ = saved
    frozen = mlp(trainable=()).model
    again = blk.LaplaceLoRA.from_pretrained(frozen, json_file.parent)
    assert torch.equal(again.predict(case.batch()).covariance, laplace.predict(case.batch()).covariance)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    narrow, (x, labels) = mlp().model.float(), case.batch()  # they were float32 before they were float64
    prediction = blk.LaplaceLoRA.from_pretrained(narrow, json_file.parent).predict((x.float(), labels))
    assert torch.allclose(prediction.covariance.double(), laplace.predict(case.batch()).covariance, rtol=1e-3)


@pytest.mark.parametrize("step", [1, 2])  # the tensors' move into place, and the JSON file's
def test_an_interrupted_write_leaves_the_old_posterior(step, saved, monkeypatch):
    case, laplace, json_file, _ = saved
    before = laplace.predict(case.batch()).covariance
    other = fitted(case, fisher="empirical", prior_precision=5.0)
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == step:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(json_file.parent)
    monkeypatch.undo()
    again = blk.LaplaceLoRA.from_pretrained(case.model, json_file.parent)
    assert torch.equal(again.predict(case.batch()).covariance, before)
    assert not [path for path in json_file.parent.iterdir() if path.name.startswith(".")]
    other.save_pretrained(json_file.parent)
    assert len(list(json_file.parent.iterdir())) == 2  # what the failure left behind is gone
