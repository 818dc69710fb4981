"""The endpoint: ingress -> proposer replicas -> aggregator replicas, on Ray Serve.

    serve run aft_ray.serving:build_app ...       what `serve_configs/*.yaml` name as `import_path`
    serve_app(config)                             the same from Python; `stop()` ends it

A walk through one request: `ingress.py` receives it, `openai_request.py` turns the body into a `Call` (model, plan,
messages) or refuses it, `inference.propose_and_aggregate` runs the plan over `HandleEngine`s, each of which streams
from an `EngineReplica`; `openai_response.py` writes what comes out as OpenAI objects, `http_errors.py` what went wrong.
"""

from aft_ray.serving.app import build_app, serve_app, served_engine, stop

__all__ = ["build_app", "serve_app", "served_engine", "stop"]
