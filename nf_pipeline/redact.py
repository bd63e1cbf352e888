"""Takes credentials out of texts that people and logs get to see: those of URLs, and those of this environment.

Errors of libraries repeat what they were given: an endpoint, a proxy, a header. What is not known here as a secret
stays in the text. Standard library only. Entries: `redacted`, `holds_credentials`.
"""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST_SECRET = 8  # characters; what is shorter would also be found inside ordinary words

_NAME = re.compile(
    r"(?:(?:^|_)(?:KEY|CREDENTIALS?|SIGNATURE)|_(?:PWD|PASS|CONNECTION_STRING)"  # PWD alone is a folder
    r"|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|APIKEY)"
    r"(?:_ID)?$",
    re.IGNORECASE,
)
# Up to the last "@": a password may hold one, or a "/", that nobody has escaped. A port is no password, and what
# follows a host without one may hold an "@", as in s3://bucket/run@2.
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s\"']+|[^/:@\s\"']+:(?!\d+(?:/|$))[^\s\"']+)@")
_SIGNED = re.compile(r"(?i)\b(X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig)=[^&\s\"']+")


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Returns a text in which credentials are replaced by `HIDDEN`.

    Args:
        text: any.
        environment: variables whose name says that they hold a secret are looked for by their value.
    """
    # The longest first: one secret may be a part of another one.
    for secret in sorted(_secrets_of(environment), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SIGNED.sub(rf"\1={HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


def holds_credentials(uri: str) -> bool:
    """Tells whether a URI carries a user, a password or a signature."""
    return bool(_USER_INFO.search(uri) or _SIGNED.search(uri))


def names_a_secret(variable: str) -> bool:
    """Tells whether the name of a variable says that its value is a secret, such as AWS_SECRET_ACCESS_KEY."""
    return bool(_NAME.search(variable))


def _secrets_of(environment: Mapping[str, str]) -> set[str]:
    return {value for name, value in environment.items() if len(value) >= SHORTEST_SECRET and names_a_secret(name)}
