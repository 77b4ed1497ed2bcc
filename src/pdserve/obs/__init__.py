"""What can be seen of the server: one log of life events, and what derives from it."""
