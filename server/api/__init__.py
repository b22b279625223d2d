"""The HTTP face: schemas, admission, routes, server-sent events, metrics. Never loads torch."""
