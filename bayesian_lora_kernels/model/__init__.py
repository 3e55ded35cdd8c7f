"""What knows torch.nn, PEFT and transformers: layers, capture, forward passes."""
