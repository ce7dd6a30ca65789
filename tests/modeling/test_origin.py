"""Where a model comes from: its card, the hub's cache and GGUF metadata, each written by the library it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from huggingface_hub import ModelCard, ModelCardData

from cushion_deploy.core.origin import Origin
from cushion_deploy.modeling.gguf_header import general_fields
from cushion_deploy.modeling.origin import origin_of_card, read_origin
from cushion_deploy.modeling.source import ModelSource


def card(**data: Any) -> str:
    return str(ModelCard.from_template(ModelCardData(**data), template_str="---\n{{ card_data }}\n---\n\n# Text\n"))


def folder(path: Path, text: str | None) -> ModelSource:
    path.mkdir(parents=True)
    if text is not None:
        (path / "README.md").write_text(text)
    return ModelSource("folder", path, str(path), None, "", "")


def gguf(path: Path, **fields: str | list[str]) -> ModelSource:
    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = "general." + name.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_uint32("general.file_type", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource("gguf", path, str(path), None, "", "")


def test_the_card_of_a_folder(tmp_path: Path) -> None:
    text = card(license="other", license_name="Llama", license_link="https://x.org/l?a=1", language=["en", "fr"])
    found = read_origin(folder(tmp_path / "m", text))
    assert found == Origin(None, "other", "Llama", "https://x.org/l?a=1", ("en", "fr"))


def test_a_snapshot_of_the_hub_is_the_base_model_and_not_what_that_was_trained_from(tmp_path: Path) -> None:
    (tmp_path / "models--my-org--my--model" / "blobs").mkdir(parents=True)
    text = card(license="other", license_link="LICENSE.md", base_model="other/older", language="en")
    found = read_origin(folder(tmp_path / "models--my-org--my--model" / "snapshots" / "abc", text))
    link = "https://huggingface.co/my-org/my--model/blob/main/LICENSE.md"
    assert found == Origin("my-org/my--model", "other", None, link, ("en",))


def test_the_metadata_of_a_gguf_file(tmp_path: Path) -> None:
    source = gguf(
        tmp_path / "m.gguf",
        license="apache-2.0",
        languages=["en", "de"],
        source__repo_url="https://huggingface.co/org/name",
        base_model__0__repo_url="https://huggingface.co/org/older",
    )
    assert read_origin(source) == Origin("org/name", "apache-2.0", None, None, ("en", "de"))
    assert "tokenizer.ggml.tokens" not in general_fields(source.path)
    assert general_fields(source.path)["general.file_type"] == 3


@pytest.mark.parametrize("size", [0, 3, 10, 30, 60, 90])
def test_a_gguf_file_that_is_cut_off_says_less(tmp_path: Path, size: int) -> None:
    path = gguf(tmp_path / "m.gguf", license="mit").path
    whole = general_fields(path)
    path.write_bytes(path.read_bytes()[:size])
    assert general_fields(path).items() <= whole.items()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "# no front matter",
        "---\n: :\n - [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: [a]\nlicense_name: 3\nlicense_link: javascript:alert(1)\nbase_model: ../x\n---\n",
        '---\nlicense: "a b"\nlicense_name: "a\\nb"\nlicense_link: "https://x/\\n"\nlanguage: [{}]\n---\n',
        "---\n!!python/object/apply:os.system [x]\n---\n",
    ],
)
def test_a_card_that_says_nothing_usable(tmp_path: Path, text: str | None) -> None:
    assert read_origin(folder(tmp_path / "m", text)) == Origin()


def test_the_card_of_a_bundle_names_its_base_model() -> None:
    text = card(license="mit", base_model="org/name")
    assert origin_of_card(text) == Origin("org/name", "mit")
