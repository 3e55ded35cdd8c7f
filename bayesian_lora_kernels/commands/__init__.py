"""The commands of `blk`, a file for each: `add_parser` says what it takes, `run` does it and returns the exit code."""
