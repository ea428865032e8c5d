"""Models by name, the cache directory, and downloads."""

from pi2rt.catalogue.names import (
    Entry,
    Installed,
    Source,
    cache_directory,
    catalogue,
    curves_directory,
    installed,
    is_fetchable,
    models_directory,
    pull,
    resolve,
)

__all__ = [
    "Entry",
    "Installed",
    "Source",
    "cache_directory",
    "catalogue",
    "curves_directory",
    "installed",
    "is_fetchable",
    "models_directory",
    "pull",
    "resolve",
]
