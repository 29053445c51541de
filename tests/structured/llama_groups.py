"""The groups of a Llama, written down by hand."""

from transformers import PreTrainedModel

from lightning_prune.structured.groups import Group, Member


def llama_groups(model: PreTrainedModel) -> list[Group]:
    """Return the feed-forward units and query heads of a Llama."""
    config = model.config
    head, groups = ((0, config.head_dim),), []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        ffn = [Member(f"{name}mlp.{part}_proj.weight", 0, ((0, 1),), "out") for part in ("gate", "up")]
        ffn.append(Member(f"{name}mlp.down_proj.weight", 1, ((0, 1),), "in"))
        groups.append(Group(f"{name}mlp", "ffn", layer, config.intermediate_size, tuple(ffn)))
        attn = f"{name}self_attn"
        members = (Member(f"{attn}.q_proj.weight", 0, head, "out"), Member(f"{attn}.o_proj.weight", 1, head, "in"))
        groups.append(
            Group(attn, "heads", layer, config.num_attention_heads, members, num_parts=config.num_key_value_heads)
        )
    return groups
