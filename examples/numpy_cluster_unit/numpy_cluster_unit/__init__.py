"""A cluster unit for pi2rt in numpy."""
