"""Executors: one package per hardware unit, each found through the entry point group ``pi2rt.executors``."""
