"""Integrations that are optional, each found through an entry point."""
