"""The command line: ``sharded-radam checkpoint|plan|doctor``.

Exit status 0: done, and for ``checkpoint diff`` no difference; 1: damage, differences, a check that failed, or an
error; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys

from sharded_radam.store.agreement import CheckpointError
from sharded_radam.tools import checkpoint, doctor, plan


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, CheckpointError) as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        print(f"sharded-radam: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sharded-radam", description="Tools for ShardedRAdam.")
    topics = parser.add_subparsers(required=True, metavar="TOPIC")
    for topic in (checkpoint, plan, doctor):
        topic.add_to(topics)
    return parser


if __name__ == "__main__":
    sys.exit(main())
