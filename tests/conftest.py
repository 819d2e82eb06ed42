"""One thread per test process: small tensors gain nothing from more, and runs in parallel do not fight for cores."""

import torch

torch.set_num_threads(1)
