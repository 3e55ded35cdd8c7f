"""What the posterior over weights says about logits."""
