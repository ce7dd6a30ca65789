"""Answers in a JSON Lines file, written batch by batch, so that an interrupted run can be continued."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.batch import Row, generate_batch
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.generate import check_request
from cushion_deploy.runtime.requests import Request, RequestId
from cushion_deploy.runtime.sampling import SamplingParams
from cushion_deploy.runtime.text import TextGenerator
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import disk_errors

_OTHER = "give the options of the run that wrote it to continue that run, or another --output"


@dataclass(frozen=True)
class Settings:
    """What an answer depends on beside its prompt and the bundle."""

    params: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    engine: str = "onnxruntime"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A request as token ids, with a digest of everything that decides its answer."""

    id: RequestId
    where: str
    prompt_ids: Sequence[int]
    digest: str

    def answer(self, row: Row) -> dict[str, Any]:
        """Return the JSON object of a finished answer; the id comes first."""
        return {
            "id": self.id,
            "text": row.text,
            "finish_reason": row.finish_reason,
            "prompt_tokens": len(self.prompt_ids),
            "new_tokens": row.new_tokens,
            "request": self.digest,
        }

    def is_answer(self, line: bytes) -> bool:
        """Return whether a whole line is an answer to this request with the same bundle and options."""
        try:
            value = json.loads(line)
        except ValueError:
            return False
        return isinstance(value, dict) and (value.get("id"), value.get("request")) == (self.id, self.digest)

    def begins(self, part: bytes) -> bool:
        """Return whether a line that was cut off may be the beginning of an answer to this request."""
        begin = f'{{"id": {json.dumps(self.id, ensure_ascii=False)}, "text": "'.encode()
        if not part.startswith(begin):
            return begin.startswith(part)
        # With its end in place, only the newline is missing, and the digest can be compared.
        return self.is_answer(part) or not _is_json(part)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def make_jobs(bundle: Bundle, requests: Sequence[Request], settings: Settings) -> list[Job]:
    """Encode all requests and check that the model has positions for them and their answers; no engine is needed.

    Raises:
        UsageError: the message names file and line of the first request that cannot be met.
    """
    decides = [bundle.manifest.digest, settings.to_json()]
    return [_job(bundle, request, settings.max_new_tokens, decides) for request in requests]


def _job(bundle: Bundle, request: Request, max_new_tokens: int, decides: list[Any]) -> Job:
    with _named(request.where):
        if request.messages is not None:
            ids = bundle.encode_chat(request.messages)
        else:
            ids = bundle.encode_prompt(request.prompt or "")
        check_request(bundle.contract, ids, max_new_tokens)
    return Job(request.id, request.where, ids, digest_json([*decides, ids])[:16])


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Begin the message of a UsageError with the file and line that it is about."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"{where}: {e.message}", hint=e.hint) from e


def finished(file: Path, jobs: Sequence[Job]) -> tuple[int, int]:
    """Return how many jobs are answered in a file, and how many bytes their complete lines take.

    A last line that was cut off by an interruption does not count.

    Raises:
        UsageError: the file has anything but answers to the first of these jobs, or cannot be read.
    """
    data = _read(file)
    *lines, rest = data.split(b"\n")
    if len(lines) > len(jobs) or (rest and not (len(lines) < len(jobs) and jobs[len(lines)].begins(rest))):
        raise UsageError(f"{file} exists and is not an interrupted run of these requests", hint=_OTHER)
    for number, (line, job) in enumerate(zip(lines, jobs, strict=False), 1):
        if not job.is_answer(line):
            raise UsageError(
                f"{file}:{number} is not the answer to request {job.id!r} with this bundle and these options",
                hint=_OTHER,
            )
    return len(lines), len(data) - len(rest)


def _read(file: Path) -> bytes:
    """Return the bytes of a plain file; none if it does not exist."""
    try:
        # A pipe or a device would wait for a writer, and cannot be continued.
        if stat.S_ISREG(os.stat(file).st_mode):
            return file.read_bytes()
    except FileNotFoundError:
        if not file.is_symlink():
            return b""
    except OSError as e:
        raise UsageError(f"cannot read {file}: {e.strerror}", hint="give a file that you may read and write") from e
    raise UsageError(f"{file} is not a plain file", hint="give a new file, or that of an interrupted run")


def write_answers(
    generator: TextGenerator, jobs: Sequence[Job], settings: Settings, file: Path, batch: int
) -> Iterator[int]:
    """Answer the jobs that are not yet in ``file``, in order, and yield the number of answers in it after each batch.

    Every batch is on disk before the next one begins.

    Raises:
        UsageError: a request is too long for the engine, whose context may be shorter than the bundle's (file and line
            are named, and nothing has run); or the file has something else in it, or cannot be written.
    """
    for job in jobs:
        with _named(job.where):
            check_request(generator.session.contract, job.prompt_ids, settings.max_new_tokens)
    with disk_errors(file):
        done, size = finished(file, jobs)
        with open(file, "r+b" if file.exists() else "xb") as out:
            out.truncate(size)
            out.seek(size)
            for begin in range(done, len(jobs), batch):
                part = jobs[begin : begin + batch]
                rows = generate_batch(
                    generator.session,
                    generator.bundle.tokenizer,
                    [job.prompt_ids for job in part],
                    settings.params,
                    settings.max_new_tokens,
                    stop_ids=generator.bundle.eos_token_ids,
                    stop_strings=settings.stop,
                )
                answers = [json.dumps(job.answer(row), ensure_ascii=False) for job, row in zip(part, rows, strict=True)]
                out.write("".join(f"{line}\n" for line in answers).encode())
                out.flush()
                os.fsync(out.fileno())
                yield begin + len(part)
