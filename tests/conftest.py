"""Every test runs on one thread: tiny models are several times slower on more, and machines are shared."""

import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
torch.set_num_threads(1)
