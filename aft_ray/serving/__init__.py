"""The endpoint: ingress -> aggregator replicas -> proposer replicas, on Ray Serve.

    serve run aft_ray.serving:build_app ...       the `import_path` of `serve_configs/*.yaml`
    serve_app(config)                             the same from Python; `drain()` and `stop()` end it
    http.inside.ServeTransport(name)              HTTP to an application over its Serve handle, from within the cluster

    http/      the routes: what arrives is authorised, answered by `service.py` and written as a reply
    openai/    OpenAI's objects: requests are read or refused, results become replies, pieces and events
    limits/    keys, limits over all ingress replicas, and the ledger of what was used

The path of one request: `ingress.py` receives it, `limits/keys.py` identifies the sender, `openai/request.py` turns the
body into a `ChatCall` (model, plan, messages) or refuses it, and `limits/gate.py` asks the one `limits/control.py`
whether it may run (`limits/admission.py`) and with which adapters (`adapters.py`). A `RunRequest` then goes to an
aggregator replica, where `inference.propose_and_aggregate` runs the plan over its own engine and over `HandleEngine`s,
each of which streams from an `EngineReplica`. `openai/response.py` writes the result as OpenAI objects, `errors.py` the
errors, `limits/ledger.py` the cost. `http/admin.py` has the routes for operators.
"""

from aft_ray.serving.app import drain, serve_app, served_engine, stop
from aft_ray.serving.deployments import build_app, content_named

__all__ = ["build_app", "content_named", "drain", "serve_app", "served_engine", "stop"]
