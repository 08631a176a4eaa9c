"""One file per kind of adapter; a kind is recognised by its `matches(tensors)`."""
