"""The errors of both packages: each is a DeltaMemError, and the built-in error that fits."""


class DeltaMemError(Exception):
    """What these packages refuse, or could not do; the message names the argument or the file."""


class ArgumentError(DeltaMemError, ValueError):
    """An argument has a value that is not allowed; nothing was changed."""


class ArgumentTypeError(DeltaMemError, TypeError):
    """An argument is of a type that is not allowed; nothing was changed."""


class ArgumentIndexError(ArgumentError, IndexError):
    """An index, or a mask of indices, lies outside what it selects from."""


class ArgumentKeyError(ArgumentError, KeyError):
    """There is nothing under this key."""

    # KeyError shows its message in quotes.
    __str__ = Exception.__str__


class UnsupportedError(ArgumentError, NotImplementedError):
    """What was asked for is not supported."""


class MissingPackageError(DeltaMemError, ImportError, ValueError):
    """A package that this needs is not installed."""
