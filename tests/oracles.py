"""Slow, obvious definitions that the array programs are checked against. Plain Python and float64 NumPy."""

import math
import re

import numpy as np


def extract(text: bytes, mode: str, require_think_end: bool = True) -> bytes | None:
    """Return the string in the last \\boxed{} after the last </think>, or None."""
    start = 0
    if require_think_end:
        think = text.rfind(b"</think>")
        if think < 0:
            return None
        start = think + len(b"</think>")
    boxes = list(re.finditer(rb"\\boxed *\{", text[start:]))
    if not boxes:
        return None
    rest = text[start + boxes[-1].end() :]
    balanced, tail, depth, is_escaped = None, None, 1, False
    for i, byte in enumerate(rest):
        if not is_escaped:
            depth += (byte == ord("{")) - (byte == ord("}"))
            if byte == ord("}"):
                tail = rest[:i]
            if depth == 0 and balanced is None:
                balanced = rest[:i]
        is_escaped = byte == ord("\\") and not is_escaped
    if mode == "balanced":
        return balanced
    if mode == "tail":
        return tail
    return tail if balanced is None or (balanced == b"" and tail is not None) else balanced


def prefix_reward(prediction: bytes | None, tokens: list[bytes]) -> float:
    """r = 1 iff the prediction is the concatenation of the first k >= 1 tokens, zero-byte tokens aside."""
    ends, total = set(), 0
    for token in tokens:
        total += len(token)
        if total:
            ends.add(total)
    return float(prediction is not None and len(prediction) in ends and b"".join(tokens).startswith(prediction))


def first_token_reward(prediction: bytes | None, tokens: list[bytes]) -> float:
    first = next((t for t in tokens if t), None)
    return float(prediction is not None and first is not None and prediction.startswith(first))


def rope(x, positions, theta):
    """Rotate pairs (i, i + half) of the last axis by position * theta^(-i / half)."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for t, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-i / half)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def decoder_logits(config, params, tokens) -> np.ndarray:
    """float64 [T, V] of one plain sequence, written from the architecture's definition."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items() if k != "layers"}
    x = p["embedding"][tokens]

    def norm(y, scale):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    for layer in range(config.num_layers):
        w = {k: np.asarray(v[layer], np.float64) for k, v in params["layers"].items()}
        y = norm(x, w["attention_norm"])
        q, k, v = (np.einsum("td,dhq->thq", y, w[f"{n}_proj"]) for n in "qkv")
        if config.qkv_bias:
            q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
        if config.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        positions = np.arange(len(tokens))
        q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
        attended = np.zeros_like(q)
        for h in range(config.num_heads):
            g = h // (config.num_heads // config.num_kv_heads)
            for t in positions:
                scores = k[: t + 1, g] @ q[t, h] / math.sqrt(config.head_size)
                weights = np.exp(scores - scores.max())
                attended[t, h] = (weights / weights.sum()) @ v[: t + 1, g]
        x = x + np.einsum("thq,hqd->td", attended, w["o_proj"])
        y = norm(x, w["mlp_norm"])
        gate = y @ w["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up_proj"])) @ w["down_proj"]
    return norm(x, p["final_norm"]) @ p.get("head", p["embedding"]).T
