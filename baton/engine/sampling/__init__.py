"""From a step's logits to its tokens: rules (penalties, bias, masks), filters, one draw."""
