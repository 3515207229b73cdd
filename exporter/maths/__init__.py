"""Pure tensor mathematics, shared by the methods."""
