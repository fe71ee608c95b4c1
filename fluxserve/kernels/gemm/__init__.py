"""Matrix products with their prologues and epilogues, and the layers that they read."""
