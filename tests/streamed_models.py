"""Model directories opened whole and streamed, damaged copies of them, and one larger than its memory."""

import json
import shutil

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from kunbr_fast.files.models import load_model
from kunbr_fast.model.streaming import open_streamed

LARGE = dict(
    vocab_size=400, hidden_size=512, intermediate_size=2048, num_hidden_layers=32, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=False,
)  # fmt: skip
HEADROOM = 200 << 20


def whole(path, dtype=None):
    """The model in memory, its weights where torch would lay them: matrix products round by alignment."""
    model = load_model(path, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return eager_experts(model)


def folders_of_models(tmp_path_factory):
    """make(architecture): a directory with that random model, fp32, in several files; each is made once."""
    made = {}

    def make(architecture="llama"):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, torch.float32).save_pretrained(made[architecture], max_shard_size="70KB")
        return made[architecture]

    return make


def streamed(path, dtype=None, **options):
    return eager_experts(open_streamed(path, "cpu", dtype, **options))


def eager_experts(model):
    if any(hasattr(module, "num_experts") for module in model.modules()):
        model.set_experts_implementation("eager")  # the others know no fp64
    return model


def changed(path, tmp_path, change):
    """A copy of a model directory as one file, its tensors changed."""
    target = tmp_path / "changed"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shutil.copy(path / "config.json", target)
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def write_large(path):
    """537 MB of weights in files of two layers, a file at a time."""
    config = tf.LlamaConfig(**LARGE, dtype=torch.float32)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in tf.AutoModelForCausalLM.from_config(config).named_parameters()}
    noise = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0)) * 0.02
    places, files = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        layer = int(name.split(".")[2]) // 2 if ".layers." in name else "rest"
        file = f"model-{layer}.safetensors"
        value = noise.roll(-7919 * number)[: shape.numel()].view(shape) + (1.0 if len(shape) == 1 else 0.0)
        files.setdefault(file, {})[name] = value.contiguous()
        places[name] = file
    for file, tensors in files.items():
        save_file(tensors, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def memory(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) << 10
