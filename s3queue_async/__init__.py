"""An asyncio-native job queue that lives in an S3 bucket."""

from s3queue_async.dead_letters import DeadLetters
from s3queue_async.errors import (
    CorruptObject,
    InvalidPayload,
    InvalidPriority,
    InvalidSettings,
    InvalidURL,
    LeaseLost,
    MessageNotFound,
    MessageTooLarge,
    NewerFormat,
    QueueClosed,
    QueueError,
    QueueFull,
    StoreUnavailable,
    StoreUnsupported,
    Throttled,
    UnknownSetting,
)
from s3queue_async.events import Event, Latency, MetricsSnapshot
from s3queue_async.figures import log_metrics
from s3queue_async.message import (
    CompletedMessage,
    Context,
    DeadLetter,
    DeadMessage,
    DrainReport,
    Health,
    Message,
    MessageStatus,
    QueueStats,
    Release,
    Retry,
    Tracing,
    WorkerInfo,
)
from s3queue_async.queue import S3Queue
from s3queue_async.settings import Settings
from s3queue_async.storage.base import Storage
from s3queue_async.storage.plugin import PluginStorage

__version__ = "0.1.0"

__all__ = [
    "CompletedMessage",
    "Context",
    "CorruptObject",
    "DeadLetter",
    "DeadLetters",
    "DeadMessage",
    "DrainReport",
    "Event",
    "Health",
    "InvalidPayload",
    "InvalidPriority",
    "InvalidSettings",
    "InvalidURL",
    "Latency",
    "LeaseLost",
    "Message",
    "MessageNotFound",
    "MessageStatus",
    "MessageTooLarge",
    "MetricsSnapshot",
    "NewerFormat",
    "PluginStorage",
    "QueueClosed",
    "QueueError",
    "QueueFull",
    "QueueStats",
    "Release",
    "Retry",
    "S3Queue",
    "Settings",
    "Storage",
    "StoreUnavailable",
    "StoreUnsupported",
    "Throttled",
    "Tracing",
    "UnknownSetting",
    "WorkerInfo",
    "log_metrics",
]
