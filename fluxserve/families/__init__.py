"""Families of models: one folder each, with all that is known of it alone."""
