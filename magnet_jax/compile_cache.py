"""Compiled programs kept in the run directory, so that the next start need not compile them again."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_ours: str | None = None


def keep_compiled(workdir: str | Path) -> None:
    """From now on keeps what takes long to compile in a folder of `workdir/compiled`, and looks there first.

    What lies there is run as it is. So the folder has a name that only this user can know, and programs that a run directory
    of somebody else brings along are never looked at. Where JAX has been told another place (`JAX_COMPILATION_CACHE_DIR`),
    or nothing can be kept, this does nothing.
    """
    global _ours
    if jax.config.jax_compilation_cache_dir not in (None, _ours):
        return
    folder = folder_in(workdir)
    if folder is None:
        return
    if folder != _ours:
        compilation_cache.reset_cache()
    _ours = folder
    compilation_cache.set_cache_dir(folder)


def folder_in(workdir: str | Path) -> str | None:
    """That folder; None where nothing can be kept."""
    secret = _secret()
    if secret is None or (Path(workdir).exists() and not os.access(workdir, os.W_OK)):
        return None
    return str(Path(workdir).absolute() / "compiled" / hashlib.sha256(secret).hexdigest()[:32])


def _secret() -> bytes | None:
    """Random bytes that this user has kept since the first call; None where there is no place for them."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magnet-jax" / "secret"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"secret.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            os.link(temporary, path)  # Whole, and only where there is none.
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        return path.read_bytes() or None
    except (OSError, RuntimeError):  # The latter where there is no home.
        return None
