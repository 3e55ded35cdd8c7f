"""Does Laplace-LoRA beat what people use, on models that were fine-tuned by LoRA?

`make study` runs it; `make study STUDY="--task stdlib --seeds 1"` a part of it. One JSON line for each task, seed and
method; what is finished is not done again, and fine-tuned models and posteriors are kept.

The order in which things were done, so that it can be told what could have been fitted to what:

1. All methods have the package's defaults, or those of their papers; nothing of them was tuned here.
2. The tasks were written: data, sizes, models, training. While they were, only accuracy and loss of the plain model of
   the first seed were looked at (`--fine-tune-only`); no posterior was fitted to these models, no temperature, no
   ensemble. What was changed on the strength of those numbers, and of the time that they took: all models are
   trained under bfloat16 autocast (fits and predictions are in float32); MiniLM sees 240 sentences of 40 tokens for 8
   epochs, in place of 300, 48 and 10; fewer sentences to test on. `diseases` is a task of the study of labels, as it
   was but for the autocast, and `stdlib` is the demo's, which the package was developed on: neither is fresh.
3. The methods, scores and the report were written, and tested on made numbers and tiny models.
4. The study ran, in parts, as the machine was free: two seeds of each of the first three tasks, a third of `stdlib`,
   and of SmolLM2 one seed and first those methods that need no further fine-tuning. Nothing was changed after the first
   look.

Tasks (`../tasks/`), drawn anew for every seed; 100 held-out labels; foreign sentences are from the documentation of
modules of Python's standard library that are no class:

| task | question, classes | model | train | test | shift |
|---|---|---|---:|---:|---|
| `stdlib` | whose documentation, 4 | the demo's small Llama; LoRA on q, v and the output head | 600 | 400 | comments |
| `sentiment-minilm` | negative or positive, 2 | MiniLM, sequence classifier | 240 | 300 | other kinds of texts |
| `diseases` | chapter of the ICD-10-CM, 8 | MiniLM, mean pooling, linear head | 300 | 315 | inclusion terms |
| `sentiment-smollm2` | as above, by the next token | SmolLM2-135M-Instruct; LoRA on q and v | 160 | 150 | as above |

Sentiment: movie reviews to train and test on, a third each of Amazon reviews, editorials and tweets as shift.

| method | what it is | labels held out | further fine-tunings |
|---|---|---:|---:|
| MAP | the softmax of the fine-tuned model | | |
| temperature scaling | one temperature | 100 | |
| averaged temperatures | with the grid and the prior of `laplace.calibrate`, without variances | 100 | |
| MC dropout | LoRA's dropout 0.1 in training, and the model's own, in 10 passes | | 1 |
| ensemble | five models of the same data and other seeds, probabilities averaged | | 4 |
| ensemble, labels | that average, with a temperature | 100 | 4 |
| last layer, evidence | exact Laplace over the head (SmolLM2: over LoRA in the last block) and no other layer | | |
| last layer, labels | the same, with `laplace.calibrate` | 100 | |
| TFB | Shi et al. 2025: noise on LoRA's A, as much as raises the training loss by 0.3 %, 10 samples | | |
| Laplace of BayesAdapt | as `bayesadapt.laplace`: K-FAC of LoRA, A divided by examples, evidence, samples | | |
| the same, scale corrected | A divided by tokens, without padding | | |
| Laplace as published | Yang et al. 2024: LoRA only, K-FAC of rank 10 without tail, last token, evidence, samples | | |
| EKFAC, evidence | `curvature="ekfac"` and the package's defaults; the evidence alone | | |
| EKFAC, folds | the same, with `blk.crossfit` and two folds | | 2 halves |
| EKFAC, labels | the same, with `laplace.calibrate` | 100 | |
| exact, evidence / folds / labels | `curvature="exact"`, likewise | 100 (labels) | 2 halves (folds) |

Mutual information is that of samples of the logits under the posterior as it was fitted; calibration by labels or folds
changes probabilities and not samples, and so these rows have none. For `last layer` the head of `stdlib` is LoRA's
matrices on it, that of MiniLM's models the whole linear layer, which is trained as a whole.
"""
