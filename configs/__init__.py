"""The packaged configs, one folder per model, found by name (`--config smollm2/135M_owlore`)."""
