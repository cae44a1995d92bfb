"""Slurm: from a recipe to a batch job, what is done when it ends, and where it stands."""
