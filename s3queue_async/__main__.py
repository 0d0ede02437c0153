"""``python -m s3queue_async``: the command line, where its script is not on the path."""

from s3queue_async.cli import main

if __name__ == "__main__":
    main()
