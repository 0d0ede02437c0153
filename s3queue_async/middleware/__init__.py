"""Middleware around handlers; ``s3queue_async.middleware.rate_limit`` (extra ``middleware``) has one more."""

from s3queue_async.middleware.breaker import CircuitBreaker
from s3queue_async.middleware.chain import CallNext, Delivery, Middleware
from s3queue_async.middleware.idempotency import Idempotency
from s3queue_async.middleware.timing import Timed, Timing

__all__ = ["CallNext", "CircuitBreaker", "Delivery", "Idempotency", "Middleware", "Timed", "Timing"]
