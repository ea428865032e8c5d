"""What is learnt from text: thresholds, predictors, orders of neurons."""
