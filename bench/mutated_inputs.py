"""Damaged inputs of every kind: only clean errors, no hang, no crash, no more memory than a file of that size needs."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_build import SmallBuild, scratch
from stopped_builds import Trial

from cushion_deploy.errors import CushionError

BATCH = 50
"""Inputs that one process reads; a crash ends it, and the rest of its batch is read by another."""
ROUND = 1000
"""Inputs after which every kind has had its turn."""
SECONDS = 10
"""Of processor time that reading one input may take, and a twelfth of the time on a clock: the machine may be busy."""
WAITING = 12
MEMORY = 1 << 30
"""What a process may allocate beyond its start; the inputs have at most a megabyte."""
EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "NaN", "../../x", "\x00", "\u202e", "a" * 10_000, [], {}, [[]], [None], {"": None}, [1] * 1000),
)


@dataclass(frozen=True)
class Input:
    """A kind of input file.

    Attributes:
        name: name of the kind.
        share: part of all mutations that it gets.
        file: the file in a folder of the kind.
        prepare: fills the folder with intact files.
        read: reads the folder as the product does.
    """

    name: str
    share: float
    file: str
    prepare: Callable[[Path], None]
    read: Callable[[Path], object]


def inputs(build: SmallBuild) -> tuple[Input, ...]:
    """Return the kinds of inputs, with the files of a build as their intact form."""
    model, bundle = build.inputs / "model", build.bundle

    def copied(source: Path, *names: str) -> Callable[[Path], None]:
        return lambda folder: [shutil.copy(source / name, folder / name) for name in names] and None

    weights = [path.name for path in model.glob("model*.safetensors*")]
    shard = min((name for name in weights if name.endswith(".safetensors")), key=lambda n: (model / n).stat().st_size)
    whole = copied(model, "config.json", "tokenizer.json", "tokenizer_config.json", *weights)
    texts = copied(bundle, "config.json", "tokenizer.json", "tokenizer_config.json")
    return (
        Input("config.json", 0.06, "config.json", whole, _load_model),
        Input("safetensors", 0.06, shard, whole, _load_model),
        Input("GGUF", 0.08, "model.gguf", _write_gguf, _read_gguf),
        Input("tokenizer.json", 0.15, "tokenizer.json", texts, _read_texts),
        Input("tokenizer_config.json", 0.10, "tokenizer_config.json", texts, _read_texts),
        Input("chat template", 0.15, "chat_template.jinja", _write_template, _render),
        Input("manifest", 0.15, "cushion.json", copied(bundle, "cushion.json"), _read_manifest),
        Input("recipe", 0.10, "recipe.yaml", lambda folder: _write_recipe(folder), _read_recipe),
        Input("JSONL", 0.10, "text.jsonl", _write_jsonl, _read_corpus),
        Input("ONNX", 0.05, "model.onnx", copied(bundle, "export.json", "model.onnx", "model.onnx.data"), _open_graph),
    )


def mutated(build: SmallBuild, root: Path, count: int, seed: int) -> Iterator[Trial]:
    """Read about ``count`` mutated inputs, each kind its share, in child processes.

    The kinds take turns, so that a run that is stopped has read some of each.
    """
    rounds = max(1, count // ROUND)
    with scratch(root, "mutated") as top:
        folders = {kind: top / str(number) for number, kind in enumerate(inputs(build))}
        for kind, folder in folders.items():
            (folder / "intact").mkdir(parents=True)
            kind.prepare(folder / "intact")
            kind.read(folder / "intact")  # an intact input that is refused would make the rest meaningless
        for number in range(rounds):
            for kind, folder in folders.items():
                total = round(kind.share * count)
                yield from _some(kind, folder, seed, total * number // rounds, total * (number + 1) // rounds)


def _some(kind: Input, folder: Path, seed: int, first: int, last: int) -> Iterator[Trial]:
    """Read mutations ``first`` to ``last`` of a kind."""
    while first < last:
        results, crash = _batch(kind, folder, seed, first, min(first + BATCH, last))
        for wrong in results:
            yield Trial(f"mutated {kind.name}", True, wrong)
        first += len(results)
        if crash:
            yield Trial(f"mutated {kind.name}", True, f"{crash} at input {first} of seed {seed}")
            first += 1


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return a mutation of a file: bits, bytes, cuts, insertions, or a value of a JSON text."""
    if chance.random() < 0.5:
        try:
            return _mutate_json(content, chance)
        except (ValueError, UnicodeDecodeError):
            pass
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        position = chance.randrange(len(data)) if data else 0
        match chance.randrange(6):
            case 0 if data:
                data[position] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[position] = chance.choice((0, 255, 127, 128, ord("{"), ord('"'), ord("\n")))
            case 2:
                del data[position:]
            case 3:
                data[position:position] = chance.randbytes(chance.choice((1, 4, 64)))
            case 4:
                end = position + chance.choice((1, 8, 256))
                data[position:position] = data[position:end]
            case 5:
                del data[position : position + chance.choice((1, 8, 256))]
    return bytes(data)


def _mutate_json(content: bytes, chance: random.Random) -> bytes:
    value = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def visit(container: Any) -> None:
        for key, inner in container.items() if isinstance(container, dict) else enumerate(container):
            places.append((container, key))
            if isinstance(inner, dict | list) and len(places) < 5000:
                visit(inner)

    if isinstance(value, dict | list):
        visit(value)
    if not places:
        raise ValueError("nothing to change")
    container, key = chance.choice(places)
    match chance.randrange(5):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            name = "".join(chance.choices(string.ascii_lowercase, k=3))
            container[chance.choice((name, ""))] = container.pop(key)
        case 2:
            deep: Any = 0
            for _ in range(chance.choice((3, 200))):
                deep = [deep]
            container[key] = deep
        case _:
            container[key] = chance.choice(EXTREMES)
    return json.dumps(value).encode()


def _batch(kind: Input, folder: Path, seed: int, first: int, last: int) -> tuple[list[str], str]:
    """Read mutations ``first`` to ``last`` in a child; return what was wrong with each, and how the child died."""
    progress = folder / "progress"
    progress.write_text("")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _read_mutations(kind, folder, seed, range(first, last), progress)
            code = 0
        finally:  # in any case: this process must not clean up what its parent has open
            os._exit(code)
    end = time.monotonic() + SECONDS * WAITING * 1.5 * (last - first)
    status = 0
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    results = [json.loads(line) for line in progress.read_text().splitlines()]
    code = os.waitstatus_to_exitcode(status)
    return results, "" if code == 0 else f"the process died with {code}"


def _read_mutations(kind: Input, folder: Path, seed: int, numbers: range, progress: Path) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    content = (folder / "intact" / kind.file).read_bytes()
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(folder / "intact", trial)
    with progress.open("a") as out:
        for number in numbers:
            chance = random.Random(f"{seed}/{kind.name}/{number}")
            (trial / kind.file).write_bytes(mutate(content, chance))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(SECONDS * WAITING)
            wrong = ""
            try:
                kind.read(trial)
            except CushionError as e:
                wrong = "" if e.hint else f"an error without a hint: {e.message[:200]}"
            except BaseException as e:
                wrong = f"input {number}: {type(e).__name__}: {str(e)[:200]}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            out.write(json.dumps(wrong) + "\n")
            out.flush()


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"no answer after {SECONDS} seconds")


def _load_model(folder: Path) -> None:
    from cushion_deploy.modeling.load import load_folder
    from cushion_deploy.modeling.source import resolve_source

    load_folder(folder, resolve_source(str(folder)))


def _write_gguf(folder: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259)
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (259, 32), "output": (259, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(folder: Path) -> None:
    from cushion_deploy.modeling.gguf import convert_gguf
    from cushion_deploy.modeling.source import resolve_source

    converted = folder / "converted"
    shutil.rmtree(converted, ignore_errors=True)
    converted.mkdir()
    convert_gguf(resolve_source(str(folder / "model.gguf")), converted)


def _read_texts(folder: Path) -> None:
    from cushion_deploy.runtime.bundle import read_text_files

    read_text_files(folder)


def _write_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message.role == 'system' and loop.index > 1 %}"
        "{{ raise_exception('late system message') }}{% endif %}<|{{ message.role }}|>"
        "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% set answer = namespace(open=add_generation_prompt) %}{% if answer.open %}<|assistant|>{% endif %}"
    )


def _render(folder: Path) -> None:
    from cushion_deploy.runtime.chat import ChatTemplate

    source = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    ChatTemplate(source, {"eos_token": "</s>"}).render(messages)


def _read_manifest(folder: Path) -> None:
    from cushion_deploy.store import read_manifest

    read_manifest(folder)


def _write_recipe(folder: Path) -> None:
    from cushion_deploy.recipe import Recipe

    (folder / "recipe.yaml").write_text(Recipe().to_yaml())


def _read_recipe(folder: Path) -> None:
    from cushion_deploy.recipe import Recipe

    Recipe.load(folder / "recipe.yaml")


def _write_jsonl(folder: Path) -> None:
    rows = [{"text": f"Row {i} says: naïve cafés, 中文, and {i * 7} more words."} for i in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_corpus(folder: Path) -> None:
    from cushion_deploy.calib.corpora import load_corpus

    load_corpus(str(folder / "text.jsonl"), "calibration")


def _open_graph(folder: Path) -> None:
    from cushion_deploy.engines.onnxruntime.session import open_session
    from cushion_deploy.runtime.bundle import read_graph

    open_session(read_graph(folder), threads=1)
