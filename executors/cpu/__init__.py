"""The processor: a step as one native program on pinned threads."""
