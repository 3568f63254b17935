"""OwLore fine-tuning (arXiv 2405.18380) for torchtune."""

import logging

# At import, torchao 0.15 warns that its C++ kernels, which nothing here uses, were built for another version of torch.
logging.getLogger("torchao").addFilter(lambda record: "cpp extensions" not in record.getMessage())
