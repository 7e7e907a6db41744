"""Exported forms in the runtimes that people run them in, each with the same few questions.

No BOS is added to a prompt, as in training.
"""

from __future__ import annotations

import ctypes
import json
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.sources.text_encoder import EOS_TEXT


class RuntimeFormError(ValueError):
    """A form that its runtime cannot open: names the file, what was expected and what to do."""


class Decoded(NamedTuple):
    """Greedy `ids`, the seconds until the first of them was known, and those of all that follow it."""

    ids: list[int]
    first: float
    rest: float


class Runtime(ABC):
    """A model loaded in a runtime.

    Attributes:
        name: the runtime and its version.
        eos: id of `</s>`.
    """

    name: str
    eos: int

    @abstractmethod
    def log_probs(self, ids: Sequence[int]) -> list[float]:
        """Natural log-probability of each id but the first, given those before it."""

    @abstractmethod
    def greedy(self, ids: Sequence[int], count: int) -> Decoded:
        """The `count` ids after `ids`, each the most likely one but for EOS, which is never chosen."""


class LlamaCpp(Runtime):
    """A GGUF file in llama.cpp's own server, in this process.

    `exact` keeps keys and values in fp32 and attends without llama.cpp's flash attention, which rounds both to fp16
    whatever its cache holds: log-probabilities of an fp32 file of the demo are then 1e-5 from the checkpoint's, and
    2.5e-3 without. Everybody else runs llama.cpp as it comes.
    """

    def __init__(self, file: Path, threads: int, context: int, exact: bool = False) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity = False, -1
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise RuntimeFormError(f"{file}: llama.cpp cannot open it ({error})") from None
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        self.eos = self.tokenize(EOS_TEXT)[-1]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; control tokens in it are themselves."""
        told = self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return list(told["tokens"])

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        """The server tells the log-probability of what it samples, before any bias: a bias makes it sample ours."""
        return [self._log_prob(ids[:at], ids[at]) for at in range(1, len(ids))]

    def _log_prob(self, before: Sequence[int], label: int) -> float:
        told = self._sampled(before, label, 1)
        if told is None:  # it tells nothing of a token that ends within a character
            told = self._sampled(before, self.tokenize("\n")[-1], 1 << 20)
            assert told is not None
            [told] = [other for other in told["top_logprobs"] if other["id"] == label]
        return float(told["logprob"])

    def _sampled(self, before: Sequence[int], forced: int, likeliest: int) -> dict[str, Any] | None:
        answer = self._complete(before, 1, n_probs=likeliest, logit_bias=[[forced, 1e6]], cache_prompt=True)
        found: list[dict[str, Any]] = answer.get("completion_probabilities", [])
        if found and found[0]["id"] != forced:
            raise RuntimeFormError(f"llama.cpp sampled {found[0]['id']} where a bias asked for {forced}")
        return found[0] if found else None

    def greedy(self, ids: Sequence[int], count: int) -> Decoded:
        answer = self._complete(ids, count, ignore_eos=True, return_tokens=True, cache_prompt=False)
        timings = answer["timings"]
        return Decoded(answer["tokens"], timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3)

    def _complete(self, ids: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
        return self._post("/completion", {"prompt": list(ids), "n_predict": count, "temperature": 0, **more})

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request) as answer:
                told: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeFormError(f"llama.cpp refuses: {error.read().decode(errors='replace')[:300]}") from None
        return told


class OnnxRuntime(Runtime):
    """A decoder with a KV cache in ONNX Runtime, on the CPU."""

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a class for each of its status codes
            raise RuntimeFormError(f"{file}: ONNX Runtime cannot open it ({error})") from None
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        self.eos = _eos_of(file.parent.parent)
        self._pasts = {i.name: i.shape for i in self._session.get_inputs() if i.name.startswith("past_key_values.")}
        self._outputs = ["logits", *(_present(name) for name in self._pasts)]

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        logits, _ = self._run(np.array([ids]), self._empty())
        return of_labels(logits[0, :-1], ids[1:])

    def greedy(self, ids: Sequence[int], count: int) -> Decoded:
        return _timed(self._steps(ids, count))

    def _steps(self, ids: Sequence[int], count: int) -> Iterator[int]:
        step, past = np.array([ids]), self._empty()
        for _ in range(count):
            logits, past = self._run(step, past)
            logits[:, -1, self.eos] = -np.inf
            step = logits[:, -1:].argmax(-1)
            yield int(step[0, 0])

    def _empty(self) -> dict[str, np.ndarray]:
        return {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in self._pasts.items()}

    def _run(self, ids: np.ndarray, past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        before = next(iter(past.values())).shape[2]
        length = before + ids.shape[1]
        feed = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(before, length, dtype=np.int64)[None],
        }
        logits, *present = self._session.run(self._outputs, {**feed, **past})
        return logits, dict(zip(past, present, strict=True))


class CTranslate2(Runtime):
    """A folder of CTranslate2's converter."""

    def __init__(self, folder: Path, threads: int) -> None:
        import ctranslate2

        try:
            self._generator = ctranslate2.Generator(str(folder), inter_threads=1, intra_threads=threads)
        except (RuntimeError, ValueError) as error:
            raise RuntimeFormError(f"{folder}: CTranslate2 cannot open it ({error})") from None
        self.name = f"CTranslate2 {ctranslate2.__version__}"
        self._pieces: list[str] = json.loads((folder / "vocabulary.json").read_text())
        self.eos = self._pieces.index(EOS_TEXT)

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        [scored] = self._generator.score_batch([[self._pieces[i] for i in ids]], max_input_length=0)
        return list(scored.log_probs)

    def greedy(self, ids: Sequence[int], count: int) -> Decoded:
        """A thread of its own decodes, so the first token's time is that of a call for one token."""
        began = time.perf_counter()
        self._decoded(ids, 1)
        first = time.perf_counter() - began
        began = time.perf_counter()
        found = self._decoded(ids, count)
        return Decoded(found, first, max(time.perf_counter() - began - first, 1e-9))

    def _decoded(self, ids: Sequence[int], count: int) -> list[int]:
        [result] = self._generator.generate_batch(
            [[self._pieces[i] for i in ids]], max_length=count, min_length=count, end_token=[], sampling_topk=1,
            suppress_sequences=[[EOS_TEXT]], include_prompt_in_result=False,
        )  # fmt: skip
        return list(result.sequences_ids[0])


class ExecuTorch(Runtime):
    """A .pte file lowered to XNNPACK.

    XNNPACK repacks a weight for each use unless its cache of packed weights is on. ExecuTorch's build for Android has
    it on; its Python package has it off and no function for it, so that the runtime's own C++ function is called here.
    """

    def __init__(self, file: Path, threads: int, context: int) -> None:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Loader

        portable_lib._unsafe_reset_threadpool(threads)
        _cache_packed_weights()
        try:
            program = Loader.get().load_program(file)
            self._forward = program.load_method("forward")
            [self.eos] = program.load_method("get_eos_ids").execute([])
            [holds] = program.load_method("get_max_context_len").execute([])
        except (RuntimeError, ValueError, AttributeError) as error:
            raise RuntimeFormError(f"{file}: ExecuTorch cannot open it ({error})") from None
        if holds < context:
            raise RuntimeFormError(
                f"{file}: its cache holds {holds} ids, {context} are asked for; export with a longer --context"
            )
        self.name = f"ExecuTorch {version('executorch')}"

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        return of_labels(self._run(ids, 0)[:-1], ids[1:])

    def greedy(self, ids: Sequence[int], count: int) -> Decoded:
        return _timed(self._steps(ids, count))

    def _steps(self, ids: Sequence[int], count: int) -> Iterator[int]:
        step, at = list(ids), 0
        for _ in range(count):
            logits = self._run(step, at)[-1]
            logits[self.eos] = -np.inf
            at += len(step)
            step = [int(logits.argmax())]
            yield step[0]

    def _run(self, ids: Sequence[int], at: int) -> np.ndarray:
        import torch

        [logits] = self._forward.execute([torch.tensor([list(ids)]), torch.arange(at, at + len(ids))])
        found: np.ndarray = logits[0].numpy()
        return found


def _cache_packed_weights() -> None:
    """executorch::runtime::set_option("XnnpackBackend", {"weight_cache_enabled", true}) for this process."""
    import executorch

    library = ctypes.CDLL(str(Path(next(iter(executorch.__path__))) / "lib" / "libexecutorch.so"))
    # A BackendOption of the pinned version: key of 64 bytes, a variant of bool, int and 256 bytes, then which it is.
    option = ctypes.create_string_buffer(b"weight_cache_enabled".ljust(64, b"\0") + b"\1", 324)
    set_option = library._ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE
    if set_option(b"XnnpackBackend", option, ctypes.c_size_t(1)):
        raise RuntimeFormError("ExecuTorch's XNNPACK has no cache of packed weights; install the version pinned")


class Transformers(Runtime):
    """A Hugging Face folder in transformers, in the dtype of its weights."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=(folder / "modeling_mobillama.py").is_file()
            ).eval()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise RuntimeFormError(f"{folder}: transformers cannot open it ({error})") from None
        self.name = f"transformers {transformers.__version__}"
        self.eos = _eos_of(folder)

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([ids]), use_cache=False).logits
        return of_labels(logits[0, :-1].float().numpy(), ids[1:])

    def greedy(self, ids: Sequence[int], count: int) -> Decoded:
        return _timed(self._steps(ids, count))

    def _steps(self, ids: Sequence[int], count: int) -> Iterator[int]:
        step, past = self._torch.tensor([ids]), None
        for _ in range(count):
            with self._torch.inference_mode():
                answer = self._model(step, past_key_values=past, use_cache=True)
                answer.logits[:, -1, self.eos] = -self._torch.inf
                step, past = answer.logits[:, -1:].argmax(-1), answer.past_key_values
            yield int(step)


def _timed(steps: Iterator[int]) -> Decoded:
    began = time.perf_counter()
    ids = [next(steps)]
    first = time.perf_counter()
    ids += steps
    return Decoded(ids, first - began, time.perf_counter() - first)


def _eos_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["eos_token_id"])


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def of_labels(logits: np.ndarray, labels: Sequence[int]) -> list[float]:
    """Log-softmax of `logits` [n, vocab] at `labels` [n], in fp64."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(-1))
    return [float(x) for x in wide[np.arange(len(labels)), list(labels)] - total]
