"""A model behind OpenAI's completions and chat API, for evaluation programs such as lm-eval.

`cai-jax serve --model=FOLDER` starts a server; see docs/serving.md.

- `server.py` speaks HTTP: addresses, the token, limits and errors.
- `api.py` answers a request: it tokenizes, asks the worker and builds the answer.
- `protocol.py` reads the fields of a request, and `answers.py` writes those of an answer.
- `waiting.py` waits for the worker while the client is there.
- `worker.py` owns the devices. It samples with the engine and scores texts, for all requests.
- `command.py` is the command.
"""
