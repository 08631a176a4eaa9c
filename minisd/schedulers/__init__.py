"""One file per inference scheduler; the folder listing is the registry."""
