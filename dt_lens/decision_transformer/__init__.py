"""The hooked decision transformer: one model that checkpoints of every code base load into."""
