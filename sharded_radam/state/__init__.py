"""The optimizer's state, and its dicts."""
