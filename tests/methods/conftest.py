"""One thread inside torch: the tests are small, and what they check must not depend on it."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
