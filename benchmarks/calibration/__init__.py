"""Two studies of calibration, which share tasks, files and scores.

- `labels`: how many labels does calibration need, and does the posterior variance help? 30 models of six tasks.
- `methods`: does Laplace-LoRA beat what people use? Temperature scaling, MC dropout, ensembles, a last-layer posterior,
  Laplace as published: `make study`.
"""
