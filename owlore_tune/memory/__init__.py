"""How much memory a run takes: as planned, and as measured."""
