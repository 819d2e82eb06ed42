"""Rewards by pretrained networks that rate an image, or how well it fits its prompt."""
