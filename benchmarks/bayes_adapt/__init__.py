"""The Bayesian Adaptation Gym's conclusions on Laplace, and the scale of its curvature (docs/bayes-adapt.md).

`python -m benchmarks.bayes_adapt --out FOLDER`: one model of `filled.py` for each seed; at every length of the prompt,
and at batches that padding widens, the same examples, a posterior by each method, the prior precision that the evidence
chooses, and the probabilities on a test set. With `--checkout FOLDER`, a checkout of BayesAdapt, also by its own code.

`python -m benchmarks.bayes_adapt.methods --out FOLDER`: its list of methods, as a part of `make study`.
"""
