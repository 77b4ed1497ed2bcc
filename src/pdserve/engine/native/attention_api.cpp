// Entry point of attention: picks the level.
