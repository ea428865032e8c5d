"""pi2rt: language models larger than the memory they are given, inside your own Python service."""

__version__ = "0.1.0"
