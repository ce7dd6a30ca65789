"""Write a bundle of a random Llama of two layers, with a byte-level tokenizer and a chat template: for `load.py`.

    python bench/tiny_bundle.py OUT

It is the model of the tests (`tests/fakes/tiny_llama.py`) in floating point, with a prefix of three tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fakes"))

from tiny_llama import byte_level_tokenizer, write_llama

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.store import publish, staging_area

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    """Write the bundle."""
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        source = write_llama(Path(folder), byte_level_tokenizer(), 1024)
        model = load_folder(source, resolve_source(str(source)))
        quantization = Quantization(model.compute_prefix((7, 1, 300)), QuantScheme())
        with staging_area(out) as staged:
            graph = export_graph(model.spec, model.weights, quantization, GraphForm(quantized=False), staged)
            for name in FILES:
                (staged / name).write_bytes((source / name).read_bytes())
            (staged / "export.json").write_text(json.dumps(graph.to_json()))
            publish(staged, out, {}, {})


if __name__ == "__main__":
    main()
