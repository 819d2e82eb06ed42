"""The step that the searches share: draw candidates of every chain, evaluate each once, keep some.

Candidate m of chain n is named by noise slot m N + n: more candidates, another number of them per level, or larger
chunks rename none of the others.
"""

from __future__ import annotations
