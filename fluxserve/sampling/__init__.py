"""Sampling: schedules, solvers, guidance and the loop that joins them. Nothing here knows a model or an engine."""
