"""OpenAI's objects: requests are read or refused, results become replies, pieces and events."""
