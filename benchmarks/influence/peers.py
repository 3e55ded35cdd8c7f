"""Scores of kronfluence and of bergson on the same model: the change of each query's loss, `[Q, N]`.

Both give the opposite sign, and take a damping for a curvature that is a mean over the training examples: it is divided
by their number here. `None` is their own choice, a tenth of the mean eigenvalue of each module.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import problem

SEED = 0  # of the labels that both draw from the model for the Fisher


class Kronfluence:
    """Factors on disk after `fit`; scores for any damping from them."""

    def __init__(self, model: nn.Module, strategy: str, folder: Path, size: int):
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        class AnswerLoss(Task):
            """The sum of the losses of the answers; of drawn ones, for the Fisher."""

            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits = problem.answer_logits(model, batch[0])
                answers = torch.multinomial(logits.detach().softmax(dim=-1), 1).flatten() if sample else batch[1]
                return nn.functional.cross_entropy(logits, answers, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return [name for name, module in model.named_modules() if "lora_" in name and hasattr(module, "weight")]

        task = AnswerLoss()
        self.train, self.queries = (
            torch.utils.data.TensorDataset(*data) for data in (problem.train_data(), problem.query_data())
        )
        self.strategy, self.size = strategy, size
        self.analyzer = Analyzer(
            "influence", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder)
        )

    def fit(self) -> None:
        """The factors."""
        from kronfluence.arguments import FactorArguments

        torch.manual_seed(SEED)
        self.analyzer.fit_all_factors(
            "factors",
            self.train,
            per_device_batch_size=self.size,
            factor_args=FactorArguments(strategy=self.strategy),
            overwrite_output_dir=True,
        )

    def scores(self, damping: float | None) -> Tensor:
        """With a damping on the scale of sums."""
        from kronfluence.arguments import ScoreArguments

        self.analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            self.queries,
            self.train,
            per_device_query_batch_size=self.size,
            per_device_train_batch_size=self.size,
            score_args=ScoreArguments(damping_factor=None if damping is None else damping / problem.TRAIN),
            overwrite_output_dir=True,
        )
        found: Tensor = self.analyzer.load_pairwise_scores("scores")["all_modules"]
        return -found / problem.TRAIN


class Bergson:
    """Query gradients and factors on disk after `fit`; scores for any damping from them."""

    def __init__(self, saved: Path, corrected: bool, folder: Path):
        self.saved, self.corrected, self.folder = saved, corrected, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.data = {name: folder / f"{name}.jsonl" for name in ("train", "queries")}
        for name, (ids, answers) in (("train", problem.train_data()), ("queries", problem.query_data())):
            rows = [
                {"input_ids": [*x, y], "labels": [-100] * len(x) + [y]}
                for x, y in zip(ids.tolist(), answers.tolist(), strict=True)
            ]
            self.data[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fit(self) -> None:
        """All of its pipeline, scores among that, with its own damping."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        self._run("run", None, False)

    def scores(self, damping: float | None) -> Tensor:
        """With a damping on the scale of sums."""
        from bergson.data import load_scores

        shutil.rmtree(self.folder / "again", ignore_errors=True)
        (self.folder / "again").mkdir()
        for part in ("query", "hessian"):
            shutil.copytree(self.folder / "run" / part, self.folder / "again" / part)
        self._run("again", damping, True)
        found = load_scores(self.folder / "again" / "scores")[:]
        return -torch.from_numpy(found.copy()).float().mT / problem.TRAIN

    def _run(self, name: str, damping: float | None, resume: bool) -> None:
        from bergson import DataConfig, IndexConfig, PreprocessConfig, QuerySetConfig, ScoreConfig
        from bergson.config.config import HessianConfig, HessianPipelineConfig, InversionConfig
        from bergson.hessians.pipeline import hessian_pipeline

        torch.manual_seed(SEED)
        inversion = (
            InversionConfig()
            if damping is None
            else InversionConfig(inversion="absolute_damped_inverse", damping_factor=damping / problem.TRAIN)
        )
        hessian_pipeline(
            IndexConfig(
                run_path=str(self.folder / name),
                model=str(self.saved / "adapter"),
                tokenizer=str(self.saved / "base"),
                data=DataConfig(dataset=str(self.data["train"])),
                token_batch_size=512,
                loss_reduction="sum",
            ),
            HessianConfig(method="kfac", ev_correction=self.corrected),
            ScoreConfig(),
            PreprocessConfig(),
            HessianPipelineConfig(
                query=QuerySetConfig(dataset=str(self.data["queries"])), inversion_cfg=inversion, resume=resume
            ),
        )
