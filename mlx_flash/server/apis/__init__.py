"""What each HTTP API looks like: a `Request` of its bodies, its shape of events."""
