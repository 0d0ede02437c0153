"""An asyncio-native job queue that lives in an S3 bucket."""

from s3queue_async.blocking import SyncS3Queue
from s3queue_async.coordinator import Coordinator
from s3queue_async.dead_letters import DeadLetters
from s3queue_async.errors import (
    BlocksEventLoop,
    CorruptObject,
    DecryptionFailed,
    ExtraMissing,
    InvalidPayload,
    InvalidPriority,
    InvalidSettings,
    InvalidURL,
    KeyUnavailable,
    LeaseLost,
    MessageNotFound,
    MessageTooLarge,
    NewerFormat,
    PlaintextRefused,
    QueueClosed,
    QueueError,
    QueueFull,
    StoreUnavailable,
    StoreUnsupported,
    Throttled,
    UnknownSetting,
    Unreadable,
)
from s3queue_async.events import Event, Latency, MetricsSnapshot
from s3queue_async.figures import log_metrics
from s3queue_async.keyring import Keyring
from s3queue_async.looks import CoordinatorInfo, ErrorCount, MessageInfo, Overview
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
from s3queue_async.scheduling import Schedule
from s3queue_async.settings import Settings
from s3queue_async.storage.base import Storage
from s3queue_async.storage.plugin import PluginStorage

__version__ = "0.1.0"

__all__ = [
    "BlocksEventLoop",
    "CompletedMessage",
    "Context",
    "Coordinator",
    "CoordinatorInfo",
    "CorruptObject",
    "DeadLetter",
    "DeadLetters",
    "DeadMessage",
    "DecryptionFailed",
    "DrainReport",
    "ErrorCount",
    "Event",
    "ExtraMissing",
    "Health",
    "InvalidPayload",
    "InvalidPriority",
    "InvalidSettings",
    "InvalidURL",
    "KeyUnavailable",
    "Keyring",
    "Latency",
    "LeaseLost",
    "Message",
    "MessageInfo",
    "MessageNotFound",
    "MessageStatus",
    "MessageTooLarge",
    "MetricsSnapshot",
    "NewerFormat",
    "Overview",
    "PlaintextRefused",
    "PluginStorage",
    "QueueClosed",
    "QueueError",
    "QueueFull",
    "QueueStats",
    "Release",
    "Retry",
    "S3Queue",
    "Schedule",
    "Settings",
    "Storage",
    "StoreUnavailable",
    "StoreUnsupported",
    "SyncS3Queue",
    "Throttled",
    "Tracing",
    "UnknownSetting",
    "Unreadable",
    "WorkerInfo",
    "log_metrics",
]
