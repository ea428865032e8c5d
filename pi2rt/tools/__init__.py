"""What works on a whole model: calibration and perplexity."""
