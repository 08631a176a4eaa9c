"""The loop that every method shares, and what a run leaves in its folder."""
