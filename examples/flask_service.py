"""A web service on Flask, which has no event loop, that leaves the work to a queue.

    python -m examples.flask_service
    curl -X POST localhost:8000/emails -H 'content-type: application/json' -d '{"to": "a@example.com", "subject": "Hi"}'
    curl localhost:8000/stats

examples/worker.py handles what it enqueues. Behind gunicorn the queue is made before the workers are forked; each
connects by itself.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from flask import Flask, request

from examples.worker import URL, Email
from s3queue_async import MessageStatus, SyncS3Queue

app = Flask(__name__)
queue = SyncS3Queue(URL, payload_type=Email)


@app.post("/emails")
def enqueue() -> tuple[dict[str, Any], int]:
    try:
        email = msgspec.json.decode(request.get_data(), type=Email)
    except msgspec.MsgspecError as error:
        return {"error": str(error)}, 422
    return {"message_id": queue.enqueue(email, dedup_id=request.headers.get("idempotency-key"))}, 202


@app.get("/emails/<message_id>")
def status(message_id: str) -> dict[str, MessageStatus]:
    return {"status": queue.status(message_id)}


@app.get("/stats")
def stats() -> dict[str, Any]:
    counted: dict[str, Any] = msgspec.to_builtins(queue.stats())
    return counted


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "8000")))
