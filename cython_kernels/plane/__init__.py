"""The data plane: a gang of native threads and the program that it runs: program."""
