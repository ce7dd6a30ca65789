"""Run by the Python of optimum's environment: greedy tokens of a bundle through ORTModelForCausalLM, as JSON."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

bundle, count, *prompt = sys.argv[1:]
options = onnxruntime.SessionOptions()
# On processors without an INT8 dot product the usual kernels saturate, whoever runs them.
options.add_session_config_entry("session.x64quantprecision", "1")
model = ORTModelForCausalLM.from_pretrained(bundle, use_cache=True, use_io_binding=False, session_options=options)
ids = torch.tensor([[int(i) for i in prompt]])
with torch.inference_mode():
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(count), do_sample=False)
tokens = out[0, ids.shape[1] :].tolist()
text = AutoTokenizer.from_pretrained(bundle).decode(tokens)
print(json.dumps({"tokens": tokens, "decoded": bool(text)}))
