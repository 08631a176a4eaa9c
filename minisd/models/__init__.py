"""The networks. Their parameters are named as in diffusers, because the names are the file format."""
