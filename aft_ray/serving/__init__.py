"""The endpoint: ingress -> aggregator replicas -> proposer replicas, on Ray Serve.

    serve run aft_ray.serving:build_app ...       the `import_path` of `serve_configs/*.yaml`
    serve_app(config)                             the same from Python; `drain()` and `stop()` end it
    inside.ServeTransport(name)                   HTTP to an application over its Serve handle, from within the cluster

The path of one request: `ingress.py` receives it, `keys.py` identifies the sender, `openai_request.py` turns the body
into a `ChatCall` (model, plan, messages) or refuses it, and `gate.py` asks the one `control.py` whether it may run
(`admission.py`) and with which adapters (`adapters.py`). A `RunRequest` then goes to an aggregator replica, where
`inference.propose_and_aggregate` runs the plan over its own engine and over `HandleEngine`s, each of which streams from
an `EngineReplica`. `openai_response.py` writes the result as OpenAI objects, `http_errors.py` the errors, `ledger.py`
the cost. `admin.py` has the routes for operators.
"""

from aft_ray.serving.app import drain, serve_app, served_engine, stop
from aft_ray.serving.deployments import build_app, content_named

__all__ = ["build_app", "content_named", "drain", "serve_app", "served_engine", "stop"]
