"""What the emulator raises."""


class EmuError(Exception):
    """A kernel did what a GPU forbids or leaves undefined, or uses what the emulator does not know."""
