// Paged attention.
