"""`remask serve`: an OpenAI-compatible server on an `AsyncLLM`, and a page on which a canvas fills.

`app` has the endpoints, `gate` what stands before them (keys, request ids), `answers` makes responses
and streams, and `run` opens the port and ends the process.
"""
