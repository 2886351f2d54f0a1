"""Models behind an OpenAI-compatible completions API, such as vLLM, SGLang, TGI or llama.cpp.

- `config`: the address of a served model, and settings of requests.
- `protocol`: request bodies, and how the servers differ. To support another server, register it
  there.
- `answers`: a server's answer, read and compared with its request.
- `tokens`: the sampled tokens and log-probabilities, reconstructed from an answer.
- `transport`: one HTTP request, with a deadline and a size limit.
- `refusals`: errors that a server reports, and which of them may pass.
- `api_key`: the API key, which is kept out of every message.
- `connection`: requests, retries and worker threads.
- `model`: `Remote`, which the engine uses like a model in memory.
"""

from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.model import Remote

__all__ = ['Remote', 'RemoteConfig']
