"""How weights are trained: low-rank bases, the projected form, and the state of any optimizer beside them."""
