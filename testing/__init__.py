"""What tests, benchmarks and training share: a judge of pictures, random weights, tokenizers that stand in."""
