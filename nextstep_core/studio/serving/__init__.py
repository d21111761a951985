"""Pictures for other programs, over HTTP, as OpenAI's images API has it.

`asked` reads requests, `line` is where they wait and are put together, `replica` draws in a process of its own, `fleet`
has Ray Serve keep so many of those, and `app` speaks HTTP. Only the last two know what carries the data.
"""
