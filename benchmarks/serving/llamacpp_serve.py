"""Runs llama.cpp's own HTTP server through the package xllamacpp, in the peer's Python, without Sharewell.

Arguments: the settings as one JSON object."""

import json
import signal
import sys

import xllamacpp

settings = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = settings["model"]
params.model_alias = {"smollm2"}
params.hostnames = ["127.0.0.1"]
params.port = settings["port"]
params.n_parallel = settings["slots"]
params.n_ctx = settings["context"]
params.n_batch = settings["batch"]
params.n_ubatch = settings["micro_batch"]
params.kv_unified = settings["unified_kv"]
params.cont_batching = True
params.cpuparams.n_threads = settings["threads"]
params.cpuparams_batch.n_threads = settings["threads"]
params.warmup = True
params.ui = False
if not settings["flash_attention"]:
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, xllamacpp.get_system_info(), flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
