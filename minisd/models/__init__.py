"""The networks: parameter names are those of the diffusers layout, because they are the file format."""
