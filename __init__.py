"""Headway: distributed pretraining of attention models.

One recipe names a run; the same recipe runs on every layout and draws the same loss curve.
"""
