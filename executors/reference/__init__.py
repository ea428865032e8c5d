"""The specification in numpy: slow, and what every other executor is compared with."""
