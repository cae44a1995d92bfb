"""What the backward computes again instead of keeping, and what it keeps in host memory."""
