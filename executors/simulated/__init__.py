"""An executor that only keeps time, on Trio's mock clock."""
