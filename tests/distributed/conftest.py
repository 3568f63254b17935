import pytest


@pytest.fixture
def config(tiny_config) -> dict:
    """12 steps of 6 rows over 4 draws. A large eps keeps Adam from amplifying rounding errors."""
    config = tiny_config | {"batch_size": 6, "epochs": 2}
    config["optimizer"] = config["optimizer"] | {"eps": 1e-3}
    config["owlore"] = config["owlore"] | {"update_gap": 4}
    return config
