"""The routes of the endpoint: what arrives over HTTP is authorised, answered by `service.py` and written as a reply."""
