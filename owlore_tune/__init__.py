"""OwLore fine-tuning (arXiv 2405.18380) for torchtune."""
