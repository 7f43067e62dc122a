"""Before a release, and by night: ``python -m release.check`` and ``python -m release.nightly``. Not packaged.

Needs Python and git alone: what the checks need besides is installed into environments of their own.
"""
