"""Custom ops of tokred: one folder an op."""
