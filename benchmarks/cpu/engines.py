"""One engine in a process of its own: converts a checkpoint to what the engine reads, or serves requests for timings.

    python engines.py convert --engine NAME --checkpoint DIR --form FORM --out DIR
    python engines.py serve --engine NAME --model DIR --threads N          # requests and answers are lines of JSON

It runs in the Python that has the engine's package; of jisu it needs nothing unless the engine is jisu. A timing is
{"prefill_s", "decode_s", …}: from token ids to the first new token, and `steps` further ones; prompts are new each time, since some
engines keep those that they have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMS = ("float32", "bfloat16", "int8", "int4")
GROUP = 128
"""Inputs per scale of 4 bits; 32 where an engine knows no other."""


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def is_encoder(model: Path) -> bool:
    """Whether a folder holds an encoder, by what its configuration says."""
    file = model / "config.json"
    return file.exists() and json.loads(file.read_text())["model_type"] == "bert"


class Stepwise(ABC):
    """An engine that is called once per token."""

    @abstractmethod
    def begin(self, capacity: int) -> None:
        """Forget what came before; what comes has at most `capacity` tokens."""

    @abstractmethod
    def append(self, ids: list[int]) -> int:
        """Read tokens; the most probable next one."""

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float]:
        """Greedily."""
        self.begin(len(prompt) + steps + 1)
        token = 0

        def first() -> None:
            nonlocal token
            token = self.append(prompt)

        def rest() -> None:
            nonlocal token
            for _ in range(steps):
                token = self.append([token])

        return timed(first), timed(rest)


class Jisu(Stepwise):
    """This project, from a saved program."""

    def __init__(self, model: Path, threads: int) -> None:
        import jisu

        self._program = jisu.load(model, num_threads=threads)
        self._sessions: dict[int, Any] = {}

    def begin(self, capacity: int) -> None:
        if capacity not in self._sessions:
            self._sessions = {capacity: self._program.session(capacity)}
        self._session = self._sessions[capacity]
        self._session.reset()

    def append(self, ids: list[int]) -> int:
        return int(self._session.append([ids], last_only=True)[0, -1].argmax())

    def encode(self, ids: list[list[int]]) -> float:
        import numpy as np

        given = np.array(ids)
        return timed(lambda: self._program(input_ids=given, attention_mask=np.ones_like(given)))

    @staticmethod
    def convert(checkpoint: Path, form: str, out: Path) -> None:
        """Codes are the nearest: what they are does not matter to speed."""
        import jisu

        if is_encoder(checkpoint):
            import torch
            import transformers

            model = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="sdpa").eval()
            recipe = (
                {"quantize": {"scheme": form, "activations": "int8", "algorithm": "rtn"}} if "int" in form else None
            )
            ids, mask = torch.ones(2, 128, dtype=torch.int64), torch.ones(2, 128, dtype=torch.int64)
            dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=512)}
            shapes = {"input_ids": dims, "attention_mask": dims}
            given = {"input_ids": ids, "attention_mask": mask}
            jisu.compile(model, example_inputs=(), example_kwargs=given, recipe=recipe, dynamic_shapes=shapes).save(out)
            return
        head = {"layers": "head", "scheme": "int8", "activations": "int8", "algorithm": "rtn"}
        rules: dict[str, Any] = {
            "int8": [{**head, "layers": "*"}],
            "int4": [{**head, "layers": "*", "scheme": "int4", "symmetric": False, "group": GROUP}, head],
        }
        recipe = {"quantize": rules[form]} if form in rules else None
        jisu.compile(checkpoint, recipe=recipe).save(out)


class Transformers(Stepwise):
    """PyTorch, eager or with `torch.compile`, on a static cache."""

    compiled = False

    def __init__(self, model: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        form = (model / "form.txt").read_text().strip()
        checkpoint = (model / "checkpoint.txt").read_text().strip()
        self._torch, self._static = torch, transformers.StaticCache
        kind = transformers.AutoModel if is_encoder(Path(checkpoint)) else transformers.AutoModelForCausalLM
        self._model = kind.from_pretrained(checkpoint, dtype=getattr(torch, form)).eval()
        if self.compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True
            self._model.forward = torch.compile(self._model.forward, dynamic=False)
        self._caches: dict[int, Any] = {}

    def begin(self, capacity: int) -> None:
        if capacity not in self._caches:
            self._caches = {capacity: self._static(config=self._model.config, max_cache_len=capacity)}
        self._cache, self._length = self._caches[capacity], 0
        if self._cache.layers and self._cache.get_seq_length():
            self._cache.reset()

    def append(self, ids: list[int]) -> int:
        at = self._torch.arange(self._length, self._length + len(ids))[None]
        self._length += len(ids)
        given = self._torch.tensor([ids])
        out = self._model(
            input_ids=given, position_ids=at, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return int(out.logits[0, -1].argmax())

    def encode(self, ids: list[list[int]]) -> float:
        given = self._torch.tensor(ids)
        return timed(lambda: self._model(input_ids=given, attention_mask=self._torch.ones_like(given)))

    @staticmethod
    def convert(checkpoint: Path, form: str, out: Path) -> None:
        """The checkpoint itself."""
        if form not in ("float32", "bfloat16"):
            raise ValueError(f"no {form} here")
        (out / "form.txt").write_text(form)
        (out / "checkpoint.txt").write_text(str(checkpoint))


class Compiled(Transformers):
    """`torch.compile` with weights folded in and packed."""

    compiled = True


class OpenVino:
    """OpenVINO GenAI: `LLMPipeline` on the CPU."""

    def __init__(self, model: Path, threads: int) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai = openvino, openvino_genai
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        form = (model / "form.txt").read_text().strip()
        if form in ("float32", "bfloat16"):
            options["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[form]
        if is_encoder(model):
            options["PERFORMANCE_HINT"] = "LATENCY"
            self._encoder, self._options, self._requests = model / "openvino_model.xml", options, {}
            return
        self._pipeline = openvino_genai.LLMPipeline(str(model), "CPU", **options)

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float]:
        import numpy as np

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = steps + 1, True, False
        config.apply_chat_template = False
        ids = np.array([prompt], np.int64)
        given = self._genai.TokenizedInputs(self._ov.Tensor(ids), self._ov.Tensor(np.ones_like(ids)))
        metrics = self._pipeline.generate(given, config).perf_metrics
        assert metrics.get_num_generated_tokens() == steps + 1
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 * steps

    def encode(self, ids: list[list[int]]) -> float:
        import numpy as np

        shape = (len(ids), len(ids[0]))
        if shape not in self._requests:  # compiled for the shape, which is the faster way
            core = self._ov.Core()
            graph = core.read_model(self._encoder)
            graph.reshape({i.get_any_name(): list(shape) for i in graph.inputs})
            self._requests[shape] = core.compile_model(graph, "CPU", self._options).create_infer_request()
        request, given = self._requests[shape], np.array(ids, np.int64)
        fill = {"input_ids": given, "attention_mask": np.ones_like(given), "token_type_ids": np.zeros_like(given)}
        names = [i.get_any_name() for i in request.get_compiled_model().inputs]
        return timed(lambda: request.infer({n: fill[n] for n in names}))

    @staticmethod
    def convert(checkpoint: Path, form: str, out: Path) -> None:
        """By optimum-cli."""
        kind = {"float32": "fp32", "bfloat16": "fp16", "int8": "int8", "int4": "int4"}[form]
        task = "feature-extraction" if is_encoder(checkpoint) else "text-generation-with-past"
        narrow = json.loads((checkpoint / "config.json").read_text())["hidden_size"] % GROUP
        more = ["--group-size", str(64 if narrow else GROUP), "--ratio", "1.0"] if form == "int4" else []
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "-m", str(checkpoint)]
        subprocess.run([*command, "--task", task, "--weight-format", kind, *more, str(out)], check=True)
        (out / "form.txt").write_text(form)


class CTranslate2:
    """CTranslate2's generator; tokens are given by name."""

    def __init__(self, model: Path, threads: int) -> None:
        import ctranslate2

        form = (model / "form.txt").read_text().strip()
        how = {"device": "cpu", "inter_threads": 1, "intra_threads": threads, "compute_type": form}
        if is_encoder(Path((model / "checkpoint.txt").read_text())):
            self._encoder = ctranslate2.Encoder(str(model), **how)
            return
        self._generator = ctranslate2.Generator(str(model), **how)
        self._names = json.loads((model / "vocabulary.json").read_text())

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float]:
        tokens = [self._names[i] for i in prompt]

        def run(count: int, given: list[str]) -> float:
            return timed(
                lambda: self._generator.generate_batch(
                    [given], max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False
                )
            )

        first = run(1, tokens)
        return first, max(run(steps + 1, tokens[::-1]) - run(1, tokens[1:] + tokens[:1]), 1e-9)

    def encode(self, ids: list[list[int]]) -> float:
        import numpy as np

        return timed(lambda: np.asarray(self._encoder.forward_batch(ids).last_hidden_state))

    @staticmethod
    def convert(checkpoint: Path, form: str, out: Path) -> None:
        """By its own converter; it has no 4 bits for a CPU."""
        if form == "int4":
            raise ValueError("CTranslate2 has no 4 bits on CPUs")
        command = [str(Path(sys.executable).with_name("ct2-transformers-converter")), "--model", str(checkpoint)]
        subprocess.run([*command, "--quantization", form, "--output_dir", str(out), "--force"], check=True)
        (out / "form.txt").write_text(form)
        (out / "checkpoint.txt").write_text(str(checkpoint))


class OnnxRuntime(Stepwise):
    """ONNX Runtime GenAI."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime_genai

        if (model / "encoder.onnx").exists():
            import onnxruntime

            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = threads
            self._encoder = onnxruntime.InferenceSession(
                model / "encoder.onnx", settings, providers=["CPUExecutionProvider"]
            )
            return
        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._model = onnxruntime_genai.Model(config)

    def begin(self, capacity: int) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity, min_length=capacity, do_sample=False, batch_size=1)
        self._generator, self._last = self._genai.Generator(self._model, parameters), -1

    def append(self, ids: list[int]) -> int:
        import numpy as np

        if ids != [self._last]:  # what it generated itself it has read already
            self._generator.append_tokens(np.array(ids, np.int32))
        self._generator.generate_next_token()
        self._last = int(self._generator.get_next_tokens()[0])
        return self._last

    def encode(self, ids: list[list[int]]) -> float:
        import numpy as np

        given = np.array(ids, np.int64)
        fill = {"input_ids": given, "attention_mask": np.ones_like(given), "token_type_ids": np.zeros_like(given)}
        return timed(lambda: self._encoder.run(None, {i.name: fill[i.name] for i in self._encoder.get_inputs()}))

    @staticmethod
    def convert(checkpoint: Path, form: str, out: Path) -> None:
        """By its model builder, with products of integers."""
        if form == "bfloat16":
            raise ValueError("ONNX Runtime GenAI has no bfloat16 on CPUs")
        if is_encoder(checkpoint):
            _export_encoder(checkpoint, form, out / "encoder.onnx")
            return
        more = ["--extra_options", "accuracy_level=4", "block_size=32"] if form.startswith("int") else []
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(checkpoint),
            "-i",
            str(checkpoint),
        ]
        kind = {"float32": "fp32"}.get(form, form)
        subprocess.run([*command, "-o", str(out), "-p", kind, "-e", "cpu", "-c", str(out / "cache"), *more], check=True)


def _export_encoder(checkpoint: Path, form: str, out: Path) -> None:
    """By PyTorch's exporter, then ONNX Runtime's own fusions for transformers and its dynamic quantization."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    model.requires_grad_(False)  # the exporter refuses constants that have gradients

    class Plain(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]

    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 128, dtype=torch.int64)
    plain = out.with_name("plain.onnx")
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    torch.onnx.export(
        Plain(), (ids, ids, ids * 0), plain, input_names=names, dynamic_axes=axes, opset_version=17, dynamo=False
    )
    from onnxruntime.transformers.optimizer import optimize_model

    fused = optimize_model(str(plain), model_type="bert", num_heads=model.config.num_attention_heads,
                           hidden_size=model.config.hidden_size)  # fmt: skip
    fused.save_model_to_file(str(plain))
    if form == "float32":
        plain.rename(out)
        return
    if form != "int8":
        raise ValueError(f"no {form} for encoders here")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(plain, out, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1})
    plain.unlink()


class LlamaCpp(Stepwise):
    """llama.cpp by llama-cpp-python's bindings; `flash` says how attention is computed."""

    flash = 0

    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        file = str(model / "model.gguf").encode()
        self._model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
        self._context: Any = None
        self._capacity = 0

    def begin(self, capacity: int) -> None:
        lib = self._lib
        if capacity != self._capacity:
            if self._context is not None:
                lib.llama_free(self._context)
            options = lib.llama_context_default_params()
            options.n_ctx, options.n_batch = capacity + 8, max(capacity, 2048)
            options.n_threads = options.n_threads_batch = self._threads
            options.flash_attn_type, options.no_perf = self.flash, True
            self._context, self._capacity = lib.llama_init_from_model(self._model, options), capacity
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)

    def append(self, ids: list[int]) -> int:
        lib = self._lib
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        import numpy as np

        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        logits = lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (size,)).argmax())

    @staticmethod
    def convert(checkpoint: Path, form: str, out: Path) -> None:
        """By gguf's writer (see to_gguf.py), then llama.cpp's quantizer."""
        import llama_cpp
        from to_gguf import write

        if is_encoder(checkpoint):
            raise ValueError("no encoders here")
        kinds = {"bfloat16": 32, "int8": 7, "int4": 2}  # LLAMA_FTYPE_MOSTLY_BF16, _Q8_0, _Q4_0
        if form not in kinds:
            raise ValueError(f"llama.cpp keeps no {form} here")
        plain = out / "plain.gguf"
        write(checkpoint, plain)
        if form == "bfloat16":
            plain.rename(out / "model.gguf")
            return
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = kinds[form], 2
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(out / "model.gguf").encode(), options):
            raise RuntimeError("llama_model_quantize failed")
        plain.unlink()


class LlamaCppFlash(LlamaCpp):
    """With flash attention."""

    flash = 1


# Each has generate(prompt, steps): seconds until the first new token, and for `steps` further ones; convert(checkpoint, form, out); and
# those that can, encode(ids): seconds for a batch of sequences of one length.
ENGINES: dict[str, Any] = {
    "jisu": Jisu,
    "eager": Transformers,
    "compile": Compiled,
    "openvino": OpenVino,
    "ctranslate2": CTranslate2,
    "onnxruntime": OnnxRuntime,
    "llama.cpp": LlamaCpp,
    "llama.cpp-fa": LlamaCppFlash,
}
PACKAGES = {
    "jisu": ("jisu", "apache-tvm"),
    "eager": ("torch", "transformers"),
    "compile": ("torch", "transformers"),
    "openvino": ("openvino", "openvino-genai", "openvino-tokenizers"),
    "ctranslate2": ("ctranslate2",),
    "onnxruntime": ("onnxruntime", "onnxruntime-genai"),
    "llama.cpp": ("llama-cpp-python", "gguf", "ml_dtypes"),
    "llama.cpp-fa": ("llama-cpp-python", "gguf", "ml_dtypes"),
}


def missing(engine: str) -> str:
    """Which of an engine's packages this Python lacks, "" if none."""
    from importlib.metadata import PackageNotFoundError, version

    for name in PACKAGES[engine]:
        try:
            version(name)
        except PackageNotFoundError:
            return name
    return ""


def resident_bytes() -> int:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(engine: Any, vocabulary: int, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests {"prompt", "steps", "batch", "seed"} until there are no more; a batch of 0 means to generate."""
    for line in sys.stdin:
        asked = json.loads(line)
        draw = random.Random(asked["seed"])
        prompts = [
            [draw.randrange(300, vocabulary - 1) for _ in range(asked["prompt"])] for _ in range(asked["batch"] or 1)
        ]
        cpu = time.process_time()
        prefill, decode = (
            (engine.encode(prompts), 0.0) if asked["batch"] else engine.generate(prompts[0], asked["steps"])
        )
        used = time.process_time() - cpu
        answer({"prefill_s": prefill, "decode_s": decode, "work_cpu_s": used, "rss_bytes": resident_bytes()})


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("missing", "convert", "serve"))
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=0)
    given = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    if given.role == "missing":
        from importlib.metadata import version

        lacks = missing(given.engine)
        found = {} if lacks else {n: version(n) for n in PACKAGES[given.engine]}
        answer({"missing": lacks, "versions": found})
    elif given.role == "convert":
        ENGINES[given.engine].convert(given.checkpoint, given.form, given.out)
        answer({})
    else:
        begin = time.perf_counter()
        engine = ENGINES[given.engine](given.model, given.threads)
        answer({"load_s": time.perf_counter() - begin, "rss_bytes": resident_bytes()})
        serve(engine, given.vocabulary, answer)


if __name__ == "__main__":
    main()
