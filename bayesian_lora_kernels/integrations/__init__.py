"""The posterior as part of other packages' training loops."""
