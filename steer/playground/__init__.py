"""`steer play`: a page in the browser that runs a method on a model and shows the run while it goes on.

`options` and `session` know nothing of the page; `page` is gradio's, and the only module that imports it.
"""
