"""taskiq on a bucket: a broker, a result backend, and retries by the queue; needs the extra ``taskiq``."""

from s3queue_async.taskiq.broker import S3QueueBroker
from s3queue_async.taskiq.results import S3QueueResultBackend
from s3queue_async.taskiq.retries import S3QueueRetryMiddleware

__all__ = ["S3QueueBroker", "S3QueueResultBackend", "S3QueueRetryMiddleware"]
