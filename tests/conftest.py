"""For every test: one thread a process, as the bits of some sums change with the number of threads."""

import torch

torch.set_num_threads(1)
