"""A conversation on a patched model: what leaves the context stays in the memory."""

from .session import MemorySession, SessionSnapshot

__all__ = ["MemorySession", "SessionSnapshot"]
