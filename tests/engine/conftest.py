from tests.rules.conftest import one_thread, torch_ao

__all__ = ["one_thread", "torch_ao"]
