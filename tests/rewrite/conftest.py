from tests.rules.conftest import torch_ao
from tests.threads import one_thread

__all__ = ["one_thread", "torch_ao"]
