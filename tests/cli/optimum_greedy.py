"""Run by the Python of optimum's environment: a bundle through ORTModelForCausalLM, with its tokenizer files, as JSON.

    python optimum_greedy.py BUNDLE COUNT PROMPT...

Each prompt is JSON: a list of token ids, a text, or a conversation (a list of messages). For each, one line has the ids
that are fed, and up to COUNT greedy tokens.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

bundle, count, *prompts = sys.argv[1:]
options = onnxruntime.SessionOptions()
# On processors without an INT8 dot product the usual kernels saturate, whoever runs them.
options.add_session_config_entry("session.x64quantprecision", "1")
model = ORTModelForCausalLM.from_pretrained(bundle, use_cache=True, use_io_binding=False, session_options=options)
tokenizer = AutoTokenizer.from_pretrained(bundle)
for prompt in map(json.loads, prompts):
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif isinstance(prompt[0], dict):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    else:
        ids = torch.tensor([prompt])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        out = model.generate(**given, max_new_tokens=int(count), do_sample=False)
    tokens = out[0, ids.shape[1] :].tolist()
    print(json.dumps({"ids": ids[0].tolist(), "tokens": tokens, "text": tokenizer.decode(tokens)}))
