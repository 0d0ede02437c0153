"""Schedules of a queue: messages that are enqueued at certain times."""

from s3queue_async.scheduling.scheduler import HEADER_NAME, HEADER_TICK, Scheduler
from s3queue_async.scheduling.timetable import Schedule, ScheduleOptions

__all__ = ["HEADER_NAME", "HEADER_TICK", "Schedule", "ScheduleOptions", "Scheduler"]
