"""Everything a GPU has to answer, in one command: `python -m benchmarks.gpu_report --section ... --out DIR`."""
