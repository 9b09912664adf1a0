"""Every test runs on one thread: tiny models are several times slower on more, and machines are shared."""

import torch

torch.set_num_threads(1)
