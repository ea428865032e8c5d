"""An executor for pi2rt in plain numpy."""
