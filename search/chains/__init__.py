"""Searches whose chains each move at their own pace."""
