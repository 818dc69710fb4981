"""The endpoint: ingress -> proposer replicas -> aggregator replicas, on Ray Serve.

    serve run aft_ray.serving:build_app ...       what `serve_configs/*.yaml` name as `import_path`
    serve_app(config)                             the same from Python; `drain()` and `stop()` end it

A walk through one request: `ingress.py` receives it, `keys.py` knows the sender, `openai_request.py` turns the body
into a `ChatCall` (model, plan, messages) or refuses it, `gate.py` asks the one `control.py` whether it may run
(`admission.py`) and with which adapters (`adapters.py`), `inference.propose_and_aggregate` runs the plan over
`HandleEngine`s, each of which streams from an `EngineReplica`; `openai_response.py` writes what comes out as OpenAI
objects, `http_errors.py` what went wrong, `ledger.py` what it has cost. `admin.py` is what an operator asks.
"""

from aft_ray.serving.app import build_app, drain, serve_app, served_engine, stop

__all__ = ["build_app", "drain", "serve_app", "served_engine", "stop"]
