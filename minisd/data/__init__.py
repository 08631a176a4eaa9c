"""Images, datasets and the order in which they are seen."""
