"""Elliptic curve keys in PEM files: the private key that signs a bundle, and the public key that verifies it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cushion_deploy.errors import MissingDependency, UsageError

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
"""The curves of model-signing, by the name that OpenSSL gives them."""
_MAKE_PRIVATE = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out private.pem`"
_MAKE_PUBLIC = "write it with `openssl ec -in private.pem -pubout -out public.pem`"
_LARGEST = 1 << 16


def require_model_signing() -> None:
    """Import model-signing; raises MissingDependency, with the install command, if it or a library of it is missing."""
    try:
        import model_signing.signing
        import model_signing.verifying  # noqa: F401 - what the import is for
    except ImportError as e:
        raise MissingDependency(
            f"signatures need model-signing, which cannot be imported: {e}", hint="pip install 'cushion-deploy[sign]'"
        ) from e


def check_private_key(path: Path, password: bytes | None) -> None:
    """Check that a file has a private key that can sign.

    Args:
        path: PEM file.
        password: of an encrypted key.

    Raises:
        UsageError: unreadable, not a private key, encrypted and the password missing or wrong, or of another kind.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path, _MAKE_PRIVATE)
    encrypted = b"ENCRYPTED PRIVATE KEY" in data or b"Proc-Type: 4,ENCRYPTED" in data
    if encrypted and not password:
        what = "there is no password for it" if password is None else "the password that was given is empty"
        raise UsageError(
            f"the private key {path} is encrypted, and {what}",
            hint="write the password into a file, on one line, and give that with --key-password-file",
        )
    try:
        key = load_pem_private_key(data, password)
    except TypeError as e:
        raise UsageError(
            f"there is a password for the private key {path}, which is not encrypted",
            hint="leave out the password, or give the encrypted key",
        ) from e
    except Exception as e:  # ValueError of a damaged file or a wrong password; UnsupportedAlgorithm
        if encrypted:
            raise UsageError(
                f"cannot read the private key {path}: the password is wrong, or the key is damaged",
                hint=f"try `openssl pkey -in {path} -noout`, which asks for the password; in a password file, "
                "everything before the end of the line counts, spaces too",
            ) from e
        raise UsageError(
            f"cannot read the private key {path}: it has no private key in PEM form", hint=_MAKE_PRIVATE
        ) from e
    _require_curve(path, "private", key, _MAKE_PRIVATE)


def check_public_key(path: Path) -> None:
    """Check that a PEM file has a public key that can verify; raises UsageError if it is unreadable or another kind."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path, _MAKE_PUBLIC)
    try:
        key = load_pem_public_key(data)
    except Exception as e:
        problem = "it has a private key" if b"PRIVATE KEY-----" in data else "it has no public key in PEM form"
        raise UsageError(f"cannot read the public key {path}: {problem}", hint=_MAKE_PUBLIC) from e
    _require_curve(path, "public", key, _MAKE_PUBLIC)


def _read(path: Path, hint: str) -> bytes:
    return read_small_file(path, _LARGEST, lambda why: UsageError(f"cannot read the key {path}: {why}", hint=hint))


def _require_curve(path: Path, kind: str, key: Any, hint: str) -> None:
    curve = getattr(key, "curve", None)
    if curve is None or curve.name not in CURVES:
        found = "not of an elliptic curve" if curve is None else f"of the curve {curve.name}"
        raise UsageError(f"the {kind} key {path} is {found}, expected {', '.join(CURVES.values())}", hint=hint)


def read_small_file(path: Path, largest: int, error: Callable[[str], Exception]) -> bytes:
    """Return the bytes of a plain file.

    Args:
        path: what to read; a pipe or a device is never opened.
        largest: most bytes that it may have.
        error: returns the error to raise, given what is wrong.
    """
    try:
        if not path.is_file():
            raise error("it is not a plain file" if path.exists() else "it does not exist")
        with open(path, "rb") as f:
            data = f.read(largest + 1)
    except OSError as e:
        raise error(e.strerror or str(e)) from e
    if len(data) > largest:
        raise error(f"it has more than {largest} bytes")
    return data
