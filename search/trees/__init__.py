"""Searches that grow a tree: DTS and DTS*."""
