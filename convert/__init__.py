"""Maps between checkpoint layouts: numpy in, numpy out, no framework."""
