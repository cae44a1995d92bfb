"""Accelerate's launcher and config files: what they ask for becomes a job's settings."""
