"""From options to a running model: the plan, the executors, what a change of memory does."""
