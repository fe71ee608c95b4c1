"""Families of models: one folder each, which alone knows what its members are and how they are drawn."""
