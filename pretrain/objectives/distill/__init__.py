"""Distillation: any objective, with a teacher.

An objective that learns from a teacher is itself, with taps in its blocks and a `Distillation` beside its head. What
the teacher gives for a row stands in the batch, under names that begin with `taught.`, whoever put it there: a
teacher that computes beside the student, or a cache of what it gave before. So the model is one for one device, and
everything that spreads an objective spreads this.
"""
