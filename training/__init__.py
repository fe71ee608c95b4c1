"""How ``checkpoints/tiny`` is made: from a package of icons to a small FLUX.1 that draws them."""
