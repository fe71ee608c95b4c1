"""One seam, several strategies: see base.py for the protocols and open.py for the choice."""
