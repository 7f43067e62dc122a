"""Servers under many clients: how many requests they take, and whether a memory is ever lost or crossed."""
