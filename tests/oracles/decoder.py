"""A Llama forward pass in float64 numpy, straight from the published tensors, one token at a time. Slow and plain."""

import json

import numpy as np
import safetensors.numpy


def next_token_logps(folder, ids) -> np.ndarray:
    """log p(ids[i + 1] | ids[: i + 1]) for every i."""
    config = json.loads((folder / "config.json").read_text())
    weights = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(folder / "model.safetensors").items()}
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean() + eps) * scale

    def rotate(x, position):
        half = H // 2
        angle = position / theta ** (np.arange(half) * 2 / H)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])

    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    keys = [[] for _ in range(config["num_hidden_layers"])]
    values = [[] for _ in range(config["num_hidden_layers"])]
    logps = []
    for position, token in enumerate(ids[:-1]):
        x = weights["model.embed_tokens.weight"][token]
        for i in range(config["num_hidden_layers"]):
            w = {
                k.removeprefix(f"model.layers.{i}."): v
                for k, v in weights.items()
                if k.startswith(f"model.layers.{i}.")
            }
            h = norm(x, w["input_layernorm.weight"])
            q = (w["self_attn.q_proj.weight"] @ h).reshape(N, H)
            keys[i].append([rotate(k, position) for k in (w["self_attn.k_proj.weight"] @ h).reshape(K, H)])
            values[i].append((w["self_attn.v_proj.weight"] @ h).reshape(K, H))
            out = []
            for n in range(N):
                group = n // (N // K)
                scores = np.array([rotate(q[n], position) @ k[group] for k in keys[i]]) / np.sqrt(H)
                probs = np.exp(scores - scores.max())
                probs /= probs.sum()
                out.append(sum(p * v[group] for p, v in zip(probs, values[i], strict=True)))
            x = x + w["self_attn.o_proj.weight"] @ np.concatenate(out)
            h = norm(x, w["post_attention_layernorm.weight"])
            gate = w["mlp.gate_proj.weight"] @ h
            x = x + w["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (w["mlp.up_proj.weight"] @ h))
        logits = head @ norm(x, weights["model.norm.weight"])
        logps.append(logits[ids[position + 1]] - np.logaddexp.reduce(logits))
    return np.array(logps)
