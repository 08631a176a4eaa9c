"""One file per checkpoint format; a format is recognised by its `matches(path)`."""
