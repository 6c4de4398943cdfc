"""`ernie-cluster key`: a new API key, and what the server keeps of it."""

from __future__ import annotations

import argparse
import hashlib
import secrets

from ernie_cluster.config.keys import ApiKey

_EXAMPLES = """\
examples:
  ernie-cluster key --name alice
  ernie-cluster serve cluster.yaml --set api.keys_file=/etc/ernie/keys.yaml

The hash also serves as api.admin_key_sha256, which guards /metrics and /admin.
"""

_PREFIX = "sk-ernie-"
"""By which scanners for leaked secrets can know a key."""
_KEY_BYTES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("--name", default="client", help="what the logs will call its owner (default: client)")


def main(args: argparse.Namespace) -> int:
    key, entry = new_key(args.name)
    print("Give this key to its owner; it is kept nowhere:")
    print(f"  {key}")
    print("Add this line to the file that api.keys_file names, with requests_per_minute, tokens_per_minute or")
    print("pixels_per_minute where it shall have limits:")
    print(f'- {{name: "{entry.name}", sha256: "{entry.sha256}"}}')
    return 0


def new_key(name: str) -> tuple[str, ApiKey]:
    """A random key of 256 bits, and its entry; raises ConfigError for a name that cannot be one."""
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return key, ApiKey(name, hashlib.sha256(key.encode()).hexdigest())
