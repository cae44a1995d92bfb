"""Every family against transformers: logits, gradients, there and back, and what `from_pretrained` says."""
