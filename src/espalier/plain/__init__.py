"""The plain deltas: what every method becomes in the end, and what saving and serving speak to."""
