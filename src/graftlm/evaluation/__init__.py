"""What a model is worth: perplexity through lm-evaluation-harness."""
