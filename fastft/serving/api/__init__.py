"""The HTTP interface over an engine: OpenAI's routes, health, metrics and the operator's routes."""
