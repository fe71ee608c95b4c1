"""Normalisation and quantisation of rows."""
