"""Rewards asked over HTTP: the client and the server for any reward, and a vision-language model as a judge."""
