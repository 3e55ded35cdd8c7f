"""What several processes do together, for tests; `python -m ranks` under torchrun goes through all of it."""
