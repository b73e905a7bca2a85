"""One file per method; each registers itself by its class name."""
