"""Models behind an OpenAI-compatible API: vLLM, SGLang, TGI, llama.cpp, and chat-only servers.

- `config`: the address of a served model, and settings of requests.
- `protocol`: request bodies, and how the servers differ. To support another server, register it
  there.
- `fields`: the body of a response, and the types of its fields.
- `answers`: a server's answer, read and compared with its request.
- `chat`: the answer of a chat API, which is text only.
- `tokens`: the sampled tokens and log-probabilities, reconstructed from an answer.
- `transport`: one HTTP request, with a deadline and a size limit.
- `refusals`: errors that a server reports, and which of them may pass.
- `api_key`: the API key, which is kept out of every message.
- `pace`: limits on requests and tokens per minute.
- `connection`: requests, retries and worker threads.
- `probes`: the test requests before a run.
- `batch`: files of requests and answers, as a second way.
- `model`: `Remote`, which the engine uses like a model in memory.
"""

from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.model import Remote

__all__ = ['Remote', 'RemoteConfig']
