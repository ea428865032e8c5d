"""Work items, channels, actors and their supervision. Knows no concrete executor and no model
architecture."""
