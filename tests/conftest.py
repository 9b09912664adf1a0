"""Every test runs on one thread: tiny models are several times slower on more, and machines are shared."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with dropout, to be read only: a resumed run has to draw what it would have drawn."""
    from tiny_runs import model_with_dropout  # here, because few tests need what it imports

    return model_with_dropout(tmp_path_factory.mktemp("model") / "dropout")
