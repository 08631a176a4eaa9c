"""One file per kind of adapter: insert, state_dict, attach."""
